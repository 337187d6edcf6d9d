"""The property types of synthetic facts: their values, their synonyms, and how people ask without naming them.

The synonyms and the questions serve any table whose properties have these names, not only synthetic ones; the last block
adds properties that real tables have and the generator does not make.
"""

# ruff: noqa: E501 (one row per property type, however long: a table to read)
from __future__ import annotations

from dataclasses import dataclass

from kblam_ray.facts.synthetic import lexicon as lex
from kblam_ray.facts.synthetic import values as val
from kblam_ray.facts.synthetic.values import ValueMaker


@dataclass(frozen=True)
class PropertyType:
    """A property, the values it takes and other ways to ask for it.

    Attributes:
        name: the property's text in a fact.
        value: makes its values; None for properties of real tables only.
        synonyms: noun phrases that mean the same and do not contain the name.
        asks: whole questions with `{e}` for the entity, none of which contains the name.
    """

    name: str
    value: ValueMaker | None
    synonyms: tuple[str, ...]
    asks: tuple[str, ...]


def _p(name: str, value: ValueMaker | None, synonyms: str, asks: str) -> PropertyType:
    return PropertyType(name, value, tuple(synonyms.split("; ")), tuple(asks.split("; ")))


_PROPERTIES = (
    # Dates and years
    _p("birth date", val.date(1880, 2009), "date of birth; birthday", "When was {e} born?; On which day did {e} come into the world?"),
    _p("founding year", val.year(1600, 2024), "year of establishment; year it was set up", "When was {e} founded?; In what year was {e} established?"),
    _p("opening date", val.date(1900, 2025), "inauguration day; day of the ribbon cutting", "When did {e} open?; Since when has {e} been open to the public?"),
    _p("launch date", val.date(1950, 2025), "day of launch; first day in service", "When was {e} launched?; On what day did {e} set out for the first time?"),
    _p("release date", val.date(1960, 2025), "publication day; day it came out", "When did {e} come out?; When was {e} first released?"),
    _p("completion year", val.year(1500, 2024), "year it was finished; year building ended", "When was {e} finished?; In which year did the work on {e} end?"),
    _p("discovery date", val.date(1750, 2024), "day it was found; date of the first sighting", "When was {e} discovered?; When did somebody first observe {e}?"),
    _p("effective date", val.date(1950, 2026), "day it enters into force; start of validity", "When does {e} take effect?; From when on does {e} apply?"),
    _p("expiry date", val.date(2025, 2040), "end of validity; last valid day", "Until when is {e} valid?; When does {e} run out?"),
    _p("last inspection", val.date(2015, 2025), "most recent check; latest audit", "When was {e} checked most recently?; When did the inspectors last visit {e}?"),
    # Numbers with and without units
    _p("population", val.integer(300, 9_000_000, separator=","), "number of inhabitants; headcount of residents", "How many people live in {e}?; How many residents does {e} have?"),
    _p("area", val.integer(2, 90_000, " km²", ","), "surface; extent in square kilometres", "How large is {e}?; How much ground does {e} cover?"),
    _p("elevation", val.integer(3, 8_000, " m", ","), "height above sea level; altitude", "How high does {e} lie?; How far above the sea is {e}?"),
    _p("length", val.integer(4, 4_000, " km", ","), "distance from end to end; total run", "How long is {e}?; How many kilometres does {e} run?"),
    _p("depth", val.integer(2, 1_500, " m"), "distance to the bottom; greatest sounding", "How deep is {e}?; How far down does {e} go?"),
    _p("mass", val.decimal(1, 900, 1, " t"), "weight; heft in tonnes", "How heavy is {e}?; How much does {e} weigh?"),
    _p("capacity", val.integer(20, 90_000, " people", ","), "number of places; largest crowd allowed", "How many people fit into {e}?; How many can {e} hold at once?"),
    _p("employee count", val.integer(3, 200_000, separator=","), "number of staff; size of the workforce", "How many people work for {e}?; How many are on the payroll of {e}?"),
    _p("annual revenue", val.money, "yearly turnover; income per year", "How much does {e} earn in a year?; How much money did {e} take in last year?"),
    _p("price", val.decimal(1, 4_000, 2, " euros"), "cost; amount on the tag", "How much does {e} cost?; What do I have to pay for {e}?"),
    _p("top speed", val.integer(9, 900, " km/h"), "highest velocity; maximum pace", "How fast can {e} go?; How quick is {e} at most?"),
    _p("battery life", val.integer(2, 400, " hours"), "running time on one charge; endurance without a plug", "How long does {e} run on one charge?; After how many hours must {e} be plugged in?"),
    _p("molecular weight", val.decimal(8, 320, 1, " kDa"), "size in kilodaltons; mass of one molecule", "How heavy is one molecule of {e}?; How many kilodaltons does {e} have?"),
    _p("melting point", val.decimal(-40, 1_900, 1, " °C"), "temperature at which it turns liquid; fusion temperature", "At what temperature does {e} melt?; How hot must {e} get to become liquid?"),
    _p("half-life", val.decimal(1, 60, 1, " hours"), "time until half is gone; decay time", "How long until half of {e} is gone?; How long does {e} stay in the body?"),
    _p("distance from Earth", val.decimal(4, 9_000, 1, " light-years"), "remoteness; separation in light-years", "How far away is {e}?; How many light-years lie between us and {e}?"),
    _p("apparent magnitude", val.decimal(1, 18, 2), "brightness in the sky; visual brightness", "How bright does {e} look?; How bright is {e} in the night sky?"),
    _p("page count", val.integer(48, 1_400), "number of leaves; thickness in sheets", "How many pages does {e} have?; How thick a book is {e}?"),
    _p("running time", val.integer(61, 240, " minutes"), "duration; screen length", "How long does {e} last?; How many minutes does {e} take to watch?"),
    _p("crew size", val.integer(2, 900), "number of hands aboard; complement", "How many people operate {e}?; How many work on board {e}?"),
    _p("daily ridership", val.integer(90, 400_000, " passengers", ","), "passengers per day; travellers each day", "How many travellers use {e} every day?; How busy is {e} on a normal day?"),
    _p("growth rate", val.decimal(0, 19, 1, " %"), "yearly increase; pace of expansion", "How quickly does {e} grow?; By how many percent does {e} increase each year?"),
    _p("accuracy", val.decimal(60, 99, 2, " %"), "share of right results; hit rate", "How often is {e} right?; How precise is {e}?"),
    # Codes
    _p("serial number", val.code("AA9-99999"), "manufacturing number; number on the type plate", "What is stamped on the type plate of {e}?; Under which number did {e} leave the factory?"),
    _p("registration code", val.code("AAA-9999"), "registry entry; licence mark", "How is {e} registered?; Which mark identifies {e} in the register?"),
    _p("postal code", val.code("99999"), "zip; mail routing digits", "What do I write before the town name on a letter to {e}?; Which digits route mail to {e}?"),
    _p("phone number", val.code("+99 999 5550-999"), "telephone line; dial-in", "How can I call {e}?; What do I dial to reach {e}?"),
    _p("ticker symbol", val.code("AAAA"), "stock abbreviation; exchange code", "Under which letters is {e} traded?; How is {e} abbreviated on the stock exchange?"),
    _p("catalogue number", val.code("9999.A.99"), "inventory entry; archive signature", "Under what entry is {e} catalogued?; How do I find {e} in the archive?"),
    _p("gene", val.code("AAA9"), "coding locus; hereditary unit behind it", "What encodes {e}?; Where in the genome is {e} written?"),
    _p("call sign", val.code("A9AA"), "radio identification; on-air identifier", "How does {e} identify itself on the radio?; What does {e} answer to over the radio?"),
    _p("error code", val.code("E-9999"), "fault identifier; number of the failure", "What does {e} show when it fails?; Which identifier appears when {e} breaks down?"),
    _p("article number", val.code("§ 999"), "paragraph; section", "Where in the code does {e} stand?; Which paragraph contains {e}?"),
    _p("version", val.code("9.99.9"), "current build; edition number", "How far has the development of {e} come?; What is the newest build of {e}?"),
    # People, places, organisations
    _p("founder", val.name_of("person"), "creator; person who started it", "Who founded {e}?; Who set up {e}?"),
    _p("chief executive", val.name_of("person"), "head of the company; managing director", "Who runs {e}?; Who is in charge at {e}?"),
    _p("author", val.name_of("person"), "writer; person who penned it", "Who wrote {e}?; Whose pen did {e} come from?"),
    _p("director", val.name_of("person"), "head; person in charge", "Who made {e}?; Who leads {e}?"),
    _p("architect", val.name_of("person"), "designer; person who drew the plans", "Who designed {e}?; Who drew the plans for {e}?"),
    _p("mayor", val.name_of("person"), "head of the town hall; leading local politician", "Who governs {e}?; Who heads the town hall of {e}?"),
    _p("spouse", val.name_of("person"), "husband or wife; partner in marriage", "Who is {e} married to?; With whom did {e} tie the knot?"),
    _p("mentor", val.name_of("person"), "teacher; person who trained them", "Who taught {e}?; From whom did {e} learn the trade?"),
    _p("discoverer", val.name_of("person"), "person who found it; first observer", "Who discovered {e}?; Who was the first to notice {e}?"),
    _p("sponsor", val.name_of("company"), "financial backer; patron", "Who pays for {e}?; With whose money is {e} held?"),
    _p("manufacturer", val.name_of("company"), "maker; producer", "Who makes {e}?; Which company builds {e}?"),
    _p("operator", val.name_of("company"), "running company; managing organisation", "Who keeps {e} running?; Which company looks after {e} from day to day?"),
    _p("birthplace", val.name_of("city"), "native town; town of origin", "Where was {e} born?; Which town does {e} come from?"),
    _p("headquarters", val.name_of("city"), "main office; seat", "Where is {e} based?; From which town is {e} run?"),
    _p("location", val.name_of("city"), "place; whereabouts", "Where is {e}?; Where can {e} be found?"),
    _p("home port", val.name_of("city"), "harbour of registry; base harbour", "Where does {e} dock when the journey is over?; Which harbour does {e} return to?"),
    _p("country", val.one_of(lex.COUNTRIES), "nation; state it belongs to", "In which nation is {e}?; To which state does {e} belong?"),
    _p("nationality", val.one_of(lex.COUNTRIES), "citizenship; passport", "Which passport does {e} hold?; Of which state is {e} a citizen?"),
    _p("sister city", val.name_of("city"), "twin town; municipal partner", "Which town is {e} twinned with?; With which town does {e} have a partnership?"),
    _p("main tributary", val.name_of("river"), "largest feeder; biggest inflow", "Which stream feeds {e} most?; From where does {e} get most of its water?"),
    _p("nearest station", val.name_of("station"), "closest railway stop; next train halt", "Where do I get off the train for {e}?; Which stop is closest to {e}?"),
    # Words and phrases
    _p("occupation", val.one_of(lex.OCCUPATIONS), "profession; line of work", "What does {e} do for a living?; How does {e} earn money?"),
    _p("instrument", val.one_of(lex.INSTRUMENTS), "musical tool of choice; thing they play", "What does {e} play on stage?; What music does {e} make at home?"),
    _p("favourite sport", val.one_of(lex.SPORTS), "athletic hobby; preferred game", "What does {e} do to keep fit?; Which games does {e} like best?"),
    _p("languages", val.some_of(lex.LANGUAGES, 1, 3), "tongues; spoken idioms", "What does {e} speak?; In which tongues can one talk to {e}?"),
    _p("official language", val.one_of(lex.LANGUAGES), "administrative tongue; idiom of the authorities", "What do the authorities speak in {e}?; In which tongue are forms in {e} written?"),
    _p("colour", val.one_of(lex.COLOURS), "shade; hue", "What does {e} look like in daylight?; How is {e} painted?"),
    _p("material", val.one_of(lex.MATERIALS), "substance; stuff it consists of", "What is {e} made of?; Out of what is {e} built?"),
    _p("genre", val.one_of(lex.GENRES), "category; type of story", "What kind of work is {e}?; On which shelf would I look for {e}?"),
    _p("style", val.one_of(lex.STYLES), "manner; artistic movement", "How would a critic classify {e}?; To which artistic movement does {e} belong?"),
    _p("licence", val.one_of(lex.LICENSES), "terms of use; legal conditions", "On what terms may I use {e}?; Under which conditions is {e} published?"),
    _p("programming language", val.some_of(lex.PROGRAMMING_LANGUAGES, 1, 2), "implementation tongue; code base idiom", "What is {e} written in?; In what is {e} coded?"),
    _p("industry", val.one_of(lex.TRADES), "line of business; sector", "What business is {e} in?; In which sector does {e} work?"),
    _p("climate", val.one_of(lex.CLIMATES), "usual weather; weather type", "What is the weather like in {e}?; Which weather should I expect in {e}?"),
    _p("rock type", val.one_of(lex.ROCKS), "geological make-up; mineral composition", "What is {e} made of under the soil?; What would a geologist find on {e}?"),
    _p("habitat", val.one_of(lex.HABITATS), "natural surroundings; living space", "Where does {e} live?; In what surroundings does {e} thrive?"),
    _p("target organ", val.one_of(lex.ORGANS), "part of the body it acts on; site of action", "Where in the body does {e} act?; Which part of the body is {e} for?"),
    _p("main ingredients", val.some_of(lex.FOODS, 2, 4), "components; things on the shopping list", "What goes into {e}?; What do I need to cook {e}?"),
    _p("status", val.one_of(lex.STATUSES), "current state; present condition", "How do things stand with {e}?; Is {e} still in use?"),
    _p("closing day", val.one_of(lex.WEEKDAYS), "weekly day of rest; day without visitors", "On which day can I not visit {e}?; When are the doors of {e} shut all day?"),
    _p("diet", val.some_of(lex.FOODS, 1, 2), "food; usual meal", "What does {e} eat?; What do you feed {e}?"),
    _p("prize", val.money, "reward; sum awarded", "What does the winner of {e} get?; How much money comes with {e}?"),
    _p("coordinates", val.coordinates, "latitude and longitude; GPS position", "Where on the map is {e}?; What do I enter into the navigator to reach {e}?"),
    _p("contact address", val.email, "e-mail; electronic mailbox", "How do I write to {e}?; Where can I send a message to {e}?"),
    _p("opening hours", val.opening_hours, "visiting times; times of admission", "When can I visit {e}?; At what time does {e} let people in?"),
    _p("motto", val.motto, "slogan; guiding words", "What words guide {e}?; What is written under the coat of arms of {e}?"),
    _p("mascot", val.thing, "lucky charm; figure that stands for it", "What figure stands for {e}?; What lucky charm does {e} have?"),
    _p("emblem", val.thing, "badge; heraldic sign", "What is shown on the flag of {e}?; What does {e} have on its badge?"),
    _p("purpose", val.purpose, "aim; reason it exists", "What is {e} for?; Why does {e} exist?"),
    _p("objective", val.purpose, "goal; ambition", "What does {e} want to achieve?; What is {e} working towards?"),
    _p("greatest achievement", val.deed, "most famous deed; proudest moment", "What is {e} most famous for?; What did {e} do that people remember?"),
    _p("early history", val.deed, "origins; first years", "How did it all begin for {e}?; What happened to {e} at the start?"),
    _p("known problem", val.thing, "weakness; open defect", "What is wrong with {e}?; What should I watch out for with {e}?"),
    _p("description", val.description, "summary; short portrait", "What is {e}?; What is meant by {e}?"),
    _p("legend", val.description, "folk tale; story people tell", "What do people tell about {e}?; What is said to have happened around {e}?"),
    _p("side effect", val.one_of(("drowsiness", "dry mouth", "headache", "itching", "loss of appetite", "mild fever", "nausea", "ringing in the ears", "sensitivity to light", "vivid dreams")), "unwanted reaction; thing patients complain about", "What may happen to me after taking {e}?; What do patients complain about after {e}?"),
    _p("dosage", val.decimal(0, 20, 1, " mg twice a day"), "amount to take; recommended quantity", "How much {e} should I take?; How is {e} to be taken?"),
    # Properties of real tables
    _p("capital", None, "seat of government; main city of state", "From which city is {e} governed?; Where does the government of {e} sit?"),
    _p("currency", None, "money; legal tender", "What do people pay with in {e}?; Which money is used in {e}?"),
    _p("continent", None, "part of the world; landmass", "In which part of the world is {e}?; On which landmass does {e} lie?"),
    _p("definition", None, "meaning; sense", "What is {e}?; What does {e} mean?"),
)  # fmt: skip

PROPERTY_TYPES: dict[str, PropertyType] = {each.name: each for each in _PROPERTIES}
