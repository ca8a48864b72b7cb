"""A study: how much of its MLPs does a model need to recite?"""
