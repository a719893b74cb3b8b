"""What outlives the process: one SQLite file and the files beside it, in one data directory."""
