"""How numbers are stored in fewer bits than they are computed in. Everything is a function of plain arrays."""
