"""Small models made to memorize, with known answers: corpus, planting, training, the zoo's builder."""
