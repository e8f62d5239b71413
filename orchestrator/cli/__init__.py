"""The command line: commands, tables and live displays. Nothing imports it."""
