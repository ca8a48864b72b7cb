"""Where the prediction appears: lenses, decoding, promotion, logit attribution."""
