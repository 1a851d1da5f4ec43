"""Pure tensor verbs that merge methods are made of."""
