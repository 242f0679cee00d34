"""What the report is made of: numbers in `columns`, charts in `charts`, thumbnails in `pictures`; the rest is drawn.

A template draws what a section of `prep.report` hands it; nothing is reckoned in a template but places on the page.
"""
