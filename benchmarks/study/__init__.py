"""The study: questions asked before running, rows that answer them, and a report."""
