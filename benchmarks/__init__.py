"""What is timed, and against whom. Every script writes benchmarks/results/*.json and prints that JSON as its last line."""
