"""The kinds of synthetic entities: how each is named and which properties it can have."""

# ruff: noqa: E501 (one row per list: a table to read)
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """A kind of entity.

    Attributes:
        name: what it is, a noun.
        patterns: its name patterns (`names.py`), each with exactly one root.
        properties: names of the property types that fit it, at least eight.
    """

    name: str
    patterns: tuple[str, ...]
    properties: tuple[str, ...]


def _kind(name: str, patterns: str, properties: str) -> Kind:
    return Kind(name, tuple(patterns.split(" | ")), tuple(properties.split(", ")))


_KINDS = (
    _kind(
        "person",
        "{first} {R} | {first} {R} | {first} {initial}. {R} | {R:title}, {first} | {first} {R}-{last} | {first} {R:apostrophe} | "
        "Dr. {first} {R} | {R} | {zh} | {ja} | {ko} | {first} {ru} | {ar} | {hi}",
        "birth date, birthplace, occupation, spouse, mentor, nationality, languages, instrument, favourite sport, "
        "greatest achievement, contact address, phone number, motto, early history, description",
    ),
    _kind(
        "city",
        "{R} | {R} | {R} | Port {R} | {R}-on-Sea | San {R} | {W} Junction | Saint-{first}-de-{R} | {R:apostrophe} | {zh}{city_zh} | "
        "{ja}{city_ja} | {ko}시 | {ru:title}град | {ar} | {hi}पुर | {el}",
        "population, area, elevation, mayor, country, postal code, founding year, sister city, official language, "
        "climate, coordinates, emblem, motto, growth rate, nearest station, legend, description",
    ),
    _kind(
        "river",
        "{R} | River {R} | Rio {R} | {R:title} Creek | {zh}河 | {ja}川 | {ko}강 | {W} Backwater",
        "length, depth, country, main tributary, location, habitat, legend, coordinates, early history, description",
    ),
    _kind(
        "mountain",
        "Mount {R} | {R} Peak | {R} | Cerro {R} | {W} Massif | {zh}山脉 | K{N} | {ja}岳",
        "elevation, location, country, rock type, discoverer, legend, climate, coordinates, early history, description",
    ),
    _kind(
        "company",
        "{R} {form} | {R} {trade} | {R:upper} | {last} & {R} | {R:lower} | {W} {trade} | {W} {form} | {R}{digit}{digit} {trade} | "
        "{zh}{form_zh} | {ko}{form_ko} | {ja}株式会社 | {ru:title} ООО | {letters} {W} {form}",
        "founding year, founder, chief executive, headquarters, industry, employee count, annual revenue, ticker symbol, "
        "contact address, phone number, motto, growth rate, objective, known problem, description",
    ),
    _kind(
        "product",
        "{R} {letters}{digit}{digit} | {W} {good} | {letters}-{A} | {R:upper} {digit}{digit}0 | {R:lower} {good} | {W:lower} | {good} {letters}{N} | "
        "{R} {good} Pro {digit} | {N}-{letters}",
        "price, manufacturer, release date, colour, material, mass, battery life, serial number, version, accuracy, "
        "known problem, error code, purpose, description",
    ),
    _kind(
        "ship",
        "MS {R} | MV {W} | HMS {W} | {W} | SS {first} {R} | {R:upper} {digit} | {ja}丸",
        "launch date, home port, operator, manufacturer, crew size, length, mass, top speed, call sign, registration code, "
        "last inspection, status, mascot, early history",
    ),
    _kind(
        "protein",
        "{letters}{N} | {R:lower}in-{digit} | {greek}-{R:lower}ase | p{N} | {letters}-{A}",
        "molecular weight, gene, discoverer, discovery date, target organ, half-life, melting point, catalogue number, "
        "purpose, description",
    ),
    _kind(
        "law",
        "{R} Act {year} | Directive {N}/{letters} | {subject} ({R}) Regulations | Lex {R} | Treaty of {R} | Order No. {N}",
        "effective date, expiry date, article number, author, country, status, objective, registration code, early history, "
        "description",
    ),
    _kind(
        "festival",
        "{R} Festival | {W} Days | Fiesta de {R} | {R} Fest {year} | {W:lower} night | {ja}祭り",
        "founding year, location, director, sponsor, capacity, opening date, mascot, motto, style, contact address, "
        "languages, legend",
    ),
    _kind(
        "star",
        "HD {N} | NGC {N} | {greek} {R} | {letters} {N} {stars} | {R}'s Star | {A} {stars}",
        "distance from Earth, apparent magnitude, discoverer, discovery date, coordinates, catalogue number, colour, "
        "legend, description, early history",
    ),
    _kind(
        "film",
        "{W} | The {W} | {R} | Return to {R} | {W:lower} never sleeps | Who Is {first} {R}? | {zh}传",
        "director, release date, running time, genre, author, languages, style, annual revenue, description, prize, "
        "sponsor, legend",
    ),
    _kind(
        "book",
        "A Chronicle of {R} | {W} and Other Stories | The {W} | Letters from {R} | {R}, or the Art of {subject} | {ru:title} | {el} {initial}.",
        "author, page count, release date, genre, languages, catalogue number, price, style, licence, description, motto, "
        "early history",
    ),
    _kind(
        "software",
        "{R:lower} | {R:lower}.js | lib{R:lower} | {R}OS {digit} | {R}DB | py-{R:lower} | {R:upper} {digit}.{digit} | {W:lower} toolkit",
        "version, licence, programming language, author, release date, known problem, error code, purpose, accuracy, "
        "contact address, mascot, objective, description",
    ),
    _kind(
        "medicine",
        "{R:lower}ol | {R}ine | {R:upper}-{digit}{digit} | {R:lower} hydrochloride | {letters}-{N}",
        "dosage, side effect, target organ, half-life, manufacturer, price, expiry date, registration code, discoverer, "
        "melting point, colour, description",
    ),
    _kind(
        "university",
        "University of {R} | {R} Institute of {subject} | {first} {R} College | {zh}大学 | {ko}대학교 | {R} Polytechnic | Universität {R}",
        "founding year, location, director, employee count, capacity, motto, mascot, emblem, contact address, "
        "phone number, objective, annual revenue, early history",
    ),
    _kind(
        "museum",
        "{R} Museum | Museum of {subject}, {R} | {W} Collection | Musée {R} | {ko}박물관 | {ja}美術館",
        "opening hours, closing day, director, location, architect, founding year, catalogue number, price, nearest station, "
        "style, phone number, contact address, description",
    ),
    _kind(
        "bridge",
        "{R} Bridge | {W} Viaduct | Pont de {R} | {first} {R} Memorial Bridge | {zh}大桥 | Bridge {N}",
        "length, completion year, architect, material, location, capacity, last inspection, status, colour, daily ridership, "
        "operator, early history",
    ),
    _kind(
        "spacecraft",
        "{R} {digit} | {R}-{digit}{initial} | {W} Orbiter | {letters}SAT-{N} | Project {R:upper}",
        "launch date, operator, manufacturer, mass, crew size, call sign, status, objective, accuracy, sponsor, known problem, "
        "greatest achievement",
    ),
    _kind(
        "dish",
        "{R:lower} | {R} soup | {W:lower} stew | {first}'s {R} pie | {ja}鍋 | {hi} करी",
        "main ingredients, country, founder, price, colour, closing day, legend, early history, description",
    ),
    _kind(
        "species",
        "{R} {greek} | {R:lower} orchidling | {W:lower} frogmouth | {R}'s tree-frog",
        "habitat, diet, discoverer, discovery date, mass, length, status, top speed, location, colour, legend, description",
    ),
    _kind(
        "game",
        "{R} | {R} {digit}: {subject} | {W} Quest | {R:upper} | {W:lower} | {ja}伝説 | Super {R}",
        "release date, genre, author, manufacturer, price, version, mascot, programming language, running time, style, "
        "error code, objective",
    ),
    _kind(
        "band",
        "The {W}s | {R} | {first} {R} Trio | {R:upper} | {W:lower} | DJ {R}{digit} | {R} & the {good}s",
        "founding year, founder, genre, instrument, style, location, motto, greatest achievement, contact address, sponsor, "
        "mascot, early history",
    ),
    _kind(
        "station",
        "{R} Central | {R} Station | {W} Halt | Gare de {R} | {ja}駅 | {ko}역 | {zh}站 | {R} {initial}{digit}",
        "opening date, operator, daily ridership, architect, location, elevation, registration code, opening hours, "
        "last inspection, phone number, status, style",
    ),
    _kind(
        "award",
        "{R} Prize | {W} Medal | {first} {R} Award | Order of the {W} | {R} Prize for {subject}",
        "founding year, sponsor, prize, founder, location, motto, emblem, objective, expiry date, contact address, "
        "early history",
    ),
)

KINDS: dict[str, Kind] = {each.name: each for each in _KINDS}
