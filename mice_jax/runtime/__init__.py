"""Setup of the process: devices, several processes, signals, flags and the compilation cache."""
