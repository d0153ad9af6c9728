"""The pages of the explorer, a file for each: its routes, what it computes, and its link in the navigation.

Each page is HTML that works without a script; `explorer.js` makes it quicker to use.
"""
