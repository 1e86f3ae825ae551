"""Sets of characters as ECMA-262 defines them.

They are ``\\d``, ``\\w``, ``\\s``, ``.``, ``\\p{…}``, and the folding of case.
"""

from __future__ import annotations

import re
from functools import lru_cache

import regex  # this package knows the properties of Unicode; Python's own re does not

from mlx_diffgemma.grammar.language import ANY, SURROGATES, Chars, chars, without

LINE_ENDS = chars([(0x0A, 0x0A), (0x0D, 0x0D), (0x2028, 0x2029)])
DOT = without(ANY, LINE_ENDS)
DIGIT = chars([(ord("0"), ord("9"))])
WORD = chars([*DIGIT.ranges, (ord("A"), ord("Z")), (ord("_"), ord("_")), (ord("a"), ord("z"))])
# White space is tab, VT, FF, the byte order mark and the category Zs.  Line terminators count too.
SPACE = chars(
    [
        (0x09, 0x0D),
        (0x20, 0x20),
        (0xA0, 0xA0),
        (0x1680, 0x1680),
        (0x2000, 0x200A),
        *LINE_ENDS.ranges,
        (0x202F, 0x202F),
        (0x205F, 0x205F),
        (0x3000, 0x3000),
        (0xFEFF, 0xFEFF),
    ]
)

PROPERTY = re.compile(r"(?:(General_Category|gc|Script|sc|Script_Extensions|scx)=)?([A-Za-z0-9_]+)")
CATEGORIES = frozenset(
    """
    C Other Cc Control cntrl Cf Format Cn Unassigned Co Private_Use Cs Surrogate L Letter LC Cased_Letter Ll Lowercase_Letter
    Lm Modifier_Letter Lo Other_Letter Lt Titlecase_Letter Lu Uppercase_Letter M Mark Combining_Mark Mc Spacing_Mark
    Me Enclosing_Mark Mn Nonspacing_Mark N Number Nd Decimal_Number digit Nl Letter_Number No Other_Number P Punctuation punct
    Pc Connector_Punctuation Pd Dash_Punctuation Pe Close_Punctuation Pf Final_Punctuation Pi Initial_Punctuation
    Po Other_Punctuation Ps Open_Punctuation S Symbol Sc Currency_Symbol Sk Modifier_Symbol Sm Math_Symbol So Other_Symbol
    Z Separator Zl Line_Separator Zp Paragraph_Separator Zs Space_Separator
    """.split()
)
BINARY = frozenset(
    """
    ASCII Any Assigned ASCII_Hex_Digit AHex Alphabetic Alpha Bidi_Control Bidi_C Bidi_Mirrored Bidi_M Case_Ignorable CI Cased
    Changes_When_Casefolded CWCF Changes_When_Casemapped CWCM Changes_When_Lowercased CWL Changes_When_Titlecased CWT
    Changes_When_Uppercased CWU Dash Default_Ignorable_Code_Point DI Deprecated Dep Diacritic Dia Emoji Emoji_Component EComp
    Emoji_Modifier EMod Emoji_Modifier_Base EBase Emoji_Presentation EPres Extended_Pictographic ExtPict Extender Ext
    Grapheme_Base Gr_Base Grapheme_Extend Gr_Ext Hex_Digit Hex ID_Continue IDC ID_Start IDS Ideographic Ideo Join_Control Join_C
    Logical_Order_Exception LOE Lowercase Lower Math Noncharacter_Code_Point NChar Pattern_Syntax Pat_Syn
    Pattern_White_Space Pat_WS Quotation_Mark QMark Radical Regional_Indicator RI Sentence_Terminal STerm Soft_Dotted SD
    Terminal_Punctuation Term Unified_Ideograph UIdeo Uppercase Upper Variation_Selector VS White_Space space XID_Continue XIDC
    XID_Start XIDS
    """.split()
)


def complement(these: Chars) -> Chars:
    return without(ANY, these)


@lru_cache(maxsize=512)
def of_property(name: str) -> Chars | None:
    """The characters of ``\\p{name}``; None for a name that ECMA-262 does not know."""
    match = PROPERTY.fullmatch(name)
    if match is None:
        return None
    kind, value = match.groups()
    if kind in (None, "General_Category", "gc") and value in CATEGORIES:
        name = f"gc={value}"
    elif kind is None and value == "Any":
        return ANY
    elif kind is None and value == "ASCII":
        return chars([(0, 0x7F)])
    elif kind is None and value == "Assigned":
        unassigned = of_property("gc=Unassigned")
        return None if unassigned is None else complement(unassigned)
    elif kind is not None and kind.lower().startswith("s"):
        name = f"{kind}={value}"
    elif kind is not None or value not in BINARY:
        return None
    try:
        pattern = regex.compile(rf"\p{{{name}}}+")
    except regex.error:
        return None
    return _matched(pattern)


def _matched(pattern: regex.Pattern[str]) -> Chars:
    """The characters that ``pattern``, runs of a class, finds among all characters."""
    gap = SURROGATES[1] + 1 - SURROGATES[0]
    ranges = []
    for match in pattern.finditer(_every_character()):
        first = match.start()
        last = match.end() - 1
        if first < SURROGATES[0]:
            ranges.append((first, min(last, SURROGATES[0] - 1)))
        if last >= SURROGATES[0]:
            ranges.append((max(first, SURROGATES[0]) + gap, last + gap))
    return chars(ranges)


@lru_cache(maxsize=1)
def _every_character() -> str:
    return "".join(chr(code) for low, high in ANY.ranges for code in range(low, high + 1))


def either_case(these: Chars) -> Chars:
    """``these``, and all characters that differ from one of them in case alone.

    This uses the simple case folding of Unicode.
    """
    return chars(
        [
            *these.ranges,
            *((code, code) for family in _families() if _meets(these, family) for code in family),
        ]
    )


def _meets(these: Chars, family: tuple[int, ...]) -> bool:
    return any(first <= code <= last for code in family for first, last in these.ranges)


@lru_cache(maxsize=1)
def _families() -> tuple[tuple[int, ...], ...]:
    """Groups of characters that differ in case alone."""
    families: dict[str, list[int]] = {}
    for code, character in zip(_every_code(), _every_character(), strict=True):
        folded = _simply_folded(character)
        if folded != character:
            families.setdefault(folded, [ord(folded)]).append(code)
    return tuple(tuple(family) for family in families.values())


def _every_code() -> list[int]:
    return [code for low, high in ANY.ranges for code in range(low, high + 1)]


def _simply_folded(character: str) -> str:
    """Fold one character to one character.

    Where the full folding is longer, Unicode's simple folding is the lower case, or there is none.
    """
    for folded in (character.casefold(), character.lower()):
        if len(folded) == 1:
            return folded
    return character
