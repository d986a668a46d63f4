"""The command line: one file per verb or group of verbs; `main` knows them all."""
