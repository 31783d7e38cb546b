"""Benchmarks: throughput over a grid, a recipe against the Hub's own way, one change at a time, fine-tuning."""
