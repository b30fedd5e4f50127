"""``kvtier bench link``: what the copy engine makes of the link, beside the link's limit and others."""
