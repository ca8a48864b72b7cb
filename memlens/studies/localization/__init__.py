"""The main job: where does this model recall these sequences?"""
