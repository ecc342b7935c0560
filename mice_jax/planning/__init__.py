"""Planning of a run before it starts: memory, time and cost on devices that this machine need not have."""
