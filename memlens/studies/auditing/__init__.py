"""The audit: which of these strings leak, from how little, is it memory, where, and what would help?"""
