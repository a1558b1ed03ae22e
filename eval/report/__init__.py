"""The figures shown: page, charts, card, JUnit."""
