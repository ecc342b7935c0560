"""What mixes the tokens of a row in layers without attention; a file for each kind, and what they share."""
