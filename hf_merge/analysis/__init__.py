"""What models changed, where, and how far they agree; and what a merge made of it: sums, tables, words, pictures."""
