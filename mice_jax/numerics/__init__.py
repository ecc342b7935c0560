"""How the state of a run is stored: in fewer bits than it is computed in, or in host memory."""
