"""The page that `python -m sde.report` writes about runs.

    record     what a run folder holds, read without touching it
    series     from lines of metrics to charts: grouping, thinning, smoothing
    axes       ranges, ticks and their labels
    drawing    charts and heat maps as SVG
    media      pictures embedded in the page, as many as fit
    settings   configuration, and what differs from the defaults or between runs
    html       elements with everything escaped
    page       the page; page.css and page.js are its style and its script

The page stands alone: it asks for nothing outside itself and says so to the browser (Content-Security-Policy), which
runs no script but the one whose hash the page names. Without JavaScript the charts are there as Python drew them; the
script draws them again at the width of the window and lets one read, zoom and smooth them.
"""
