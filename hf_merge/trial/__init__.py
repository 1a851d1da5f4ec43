"""The same input given to a merged model and its parents, one after the other: what each says to it."""
