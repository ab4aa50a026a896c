"""Measuring one request at a time, and proving how far the numbers can be trusted."""
