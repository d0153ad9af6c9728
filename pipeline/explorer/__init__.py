"""A corpus as web pages: what was kept, what was dropped and why, and whether the thresholds are right.

    serve, access   start the server; who may look
    app, pages/     the routes, a file for each page, with the template of the same name
    context         what every page can use
    catalog, query  answer questions about the committed ledgers, through DuckDB
    pictures, charts, evidence, reviews, whatif, training    what the pages show
    report          the overview as one file to send

Nothing in a request is ever a path: images are addressed by subset and key, which are looked up.
"""
