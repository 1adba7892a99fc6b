"""Some tokens need not be read. This file imports torch, never JAX.

NOTE [Sites]. On a GPU, to read a token is to wait for everything that was queued before it. Where a
program says that the token of a backward call comes from a certain keeping call, both have that
call's number in the program, their site. Each backward call takes the token that one execution of
the keeping call made, and comes after it. So where exactly one token of this execution, device and
site has been made and not been taken, it is the one. A graph that was evicted counts on: its token
has not been taken. Where several wait (a loop ran ahead, or a backward call was left out), the
words are read.

Nothing says when an execution ends, and its number may come again. So tokens whose backward call
never comes wait for good, and where there are too many of them, all tokens are read.

An address is no proof, because XLA may give two values one address.
"""

from __future__ import annotations

from ..words import Site

Token = tuple[int, ...]

_MOST = 65_536


class Waiting:
    """Tokens that were made at a site and wait for their backward call."""

    def __init__(self) -> None:
        self._tokens: dict[Site, list[Token]] = {}
        self._sites: dict[Token, Site] = {}
        self._too_many = False

    def made(self, token: Token, site: Site | None) -> None:
        """A call made a token at a site."""
        if site is None or self._too_many:
            return
        self._tokens.setdefault(site, []).append(token)
        self._sites[token] = site
        if len(self._sites) > _MOST:
            self._too_many = True
            self._tokens.clear()
            self._sites.clear()

    def only(self, site: Site | None) -> Token | None:
        """Return the token that a backward call of the site takes, if it is certain."""
        waiting = self._tokens.get(site, ()) if site is not None else ()
        return waiting[0] if len(waiting) == 1 else None

    def taken(self, token: Token) -> None:
        """A backward call has taken a token, whether or not there was a graph."""
        site = self._sites.pop(token, None)
        if site is not None:
            waiting = self._tokens[site]
            waiting.remove(token)
            if not waiting:
                del self._tokens[site]
