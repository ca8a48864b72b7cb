"""When does the prediction appear: lenses, decoding, promotion, logit attribution."""
