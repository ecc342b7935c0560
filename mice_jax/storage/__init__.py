"""Files of a run: paths, locks, workdirs, retention and provenance."""
