"""The word lists that synthetic names and values are made of.

Names stay one-to-one with entity numbers because no decoration (first names, trades, suffixes) is also one of the words
that number an entity (`ADJECTIVES`, `NOUNS`); a test proves it.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    """The comma-separated words and phrases of `text`."""
    return tuple(" ".join(item.split()) for item in text.split(","))


ADJECTIVES = _words("""
    amber, ancient, azure, bitter, blue, bold, brass, brave, bright, brisk, broken, bronze, calm, candid,
    careful, chilly, clear, clever, coastal, copper, coral, cosmic, crimson, crooked, curious, daring, dark,
    dawn, deep, distant, dusty, eager, early, eastern, elder, electric, emerald, endless, even, faded, faint,
    fearless, fiery, first, foggy, forgotten, fragrant, free, frosty, gentle, giant, gilded, glad, golden,
    grand, granite, green, grey, hidden, hollow, honest, humble, icy, idle, indigo, ivory, jade, jolly, keen,
    kind, late, lavender, lazy, leafy, lively, lonely, long, loud, lucky, lunar, marble, mellow, merry, mighty,
    mild, misty, modest, morning, mossy, narrow, nimble, noble, northern, olive, open, orange, pale, patient,
    pearl, plain, polar, proud, purple, quick, quiet, rapid, rare, red, restless, rocky, royal, rugged, rusty,
    sacred, sandy, scarlet, secret, serene, shady, sharp, shy, silent, silver, simple, sleepy, slender, slow,
    smooth, snowy, solar, solemn, southern, spare, steady, stormy, strange, sunny, swift, tall, tame, tender,
    thirsty, tidy, tiny, upper, vast, velvet, violet, vivid, wandering, warm, western, white, wide, wild, windy,
    winter, wise, wooden, yellow, young, zealous
""")

NOUNS = _words("""
    acorn, anchor, antler, apple, arrow, ash, badger, barley, basket, beacon, bear, beetle, bell, birch,
    blossom, boulder, bramble, branch, breeze, brook, buffalo, butterfly, button, candle, canyon, castle, cedar,
    cherry, chestnut, cliff, cloud, clover, comet, compass, coyote, crane, cricket, crow, crown, crystal,
    current, cypress, daisy, deer, delta, dolphin, dove, dragon, drum, dune, eagle, echo, elm, ember, falcon,
    feather, fern, field, finch, fjord, flame, flint, forest, fountain, fox, frost, galaxy, garden, gate,
    geyser, ginger, glacier, glade, goose, grain, grove, hare, harp, hawk, hazel, heath, hedge, heron, hill,
    honey, horizon, horse, ibis, iris, ivy, jackal, jasmine, jay, juniper, kestrel, kettle, kite, ladder,
    lagoon, lake, lantern, lark, laurel, leaf, ledge, lemon, leopard, lichen, lilac, lily, linden, lion, lizard,
    llama, lotus, lynx, magpie, mantle, maple, marten, meadow, melon, meteor, mill, mint, mirror, moon, moose,
    moss, moth, mountain, needle, nest, newt, oak, oasis, ocean, olivewood, orchard, orchid, osprey, otter, owl,
    panther, parrot, pebble, pelican, pepper, petal, pigeon, pine, planet, plum, pond, poplar, poppy, prairie,
    puffin, quail, quarry, quartz, quill, rabbit, rain, raven, reed, reef, ridge, rill, robin, root, rose,
    rowan, saddle, sage, sail, salmon, sapphire, seal, shadow, sheep, shell, shore, sky, snow, sparrow, spider,
    spring, spruce, squirrel, stag, stoat, stone, stork, storm, stream, summit, sun, swallow, swan, thicket,
    thistle, thorn, thrush, thunder, tide, tiger, timber, torch, trail, tree, trout, tulip, tundra, turtle,
    valley, vine, viper, walnut, wave, weaver, whale, wheat, wheel, willow, wind, wolf, wren, yarrow, yew,
    zebra, zephyr
""")

FIRST_NAMES = _words("""
    Aaron, Abigail, Ahmed, Aisha, Akira, Alejandro, Alice, Amelie, Amir, Andrea, Angus, Anika, Antoine, Arthur,
    Astrid, Beatrix, Benedict, Bjorn, Brigid, Callum, Camille, Carlos, Caspian, Cecilia, Charlotte, Chloe,
    Clement, Conrad, Daniel, Deborah, Dmitri, Edith, Edmund, Edward, Eleanor, Elijah, Elspeth, Emily,
    Emmanuel, Erik, Esther, Ethan, Eugene, Evelyn, Fatimah, Felix, Fiona, Florence, Francis, Frederick, Gabriel,
    Genevieve, George, Gideon, Giles, Grace, Gwendolyn, Hannah, Harold, Harriet, Heather, Hector,
    Heidi, Helen, Hugh, Ibrahim, Imogen, Ingrid, Isaac, Isabel, Ismail, Jacob, James, Jasper,
    Jerome, Joan, Joseph, Joyce, Judith, Julian, Juliet, Katherine, Kenneth, Kiran, Laurence, Leonard, Leopold,
    Lewis, Lionel, Louise, Lucian, Lydia, Magnus, Malcolm, Margaret, Marianne, Martin, Matthew, Maurice,
    Meredith, Michael, Mildred, Miriam, Mohammed, Nathaniel, Nicholas, Nigel, Oliver, Olivia, Oscar, Patrick,
    Paul, Penelope, Philip, Phoebe, Priya, Quentin, Rachel, Raymond, Rebecca, Reuben, Richard, Robert, Rosalind,
    Rupert, Ruth, Samuel, Sandeep, Sean, Sebastian, Shirley, Sigrid, Simon, Siobhan, Sophie, Stephen, Susan,
    Sylvie, Theodore, Thomas, Ursula, Valentine, Victor, Vincent, Violetta, Vivian, Walter, Wilfred,
    William, Winifred, Xavier, Yannick, Yasmin, Yusuf, Zoe
""")

LAST_NAMES = _words("""
    Abbott, Adeyemi, Ashworth, Bancroft, Bergstrom, Blackwood, Brennan, Bright, Caldwell, Chatterjee, Clarke,
    Cooper, Crawford, Dubois, Eriksen, Fairchild, Fitzgerald, Fleming, Gallagher, Goldberg, Grant, Greenwood,
    Hammond, Hartley, Henderson, Holloway, Hughes, Ibsen, Jennings, Johansson, Keating, Kowalczyk, Langford,
    Lindqvist, Lockwood, Mackenzie, Merriweather, Middleton, Morrison, Nguyen, Northcott, Oakley,
    Okafor, Osborne, Pemberton, Prescott, Quigley, Rasmussen, Redfern, Rutherford, Schneider, Shepherd,
    Sinclair, Smith, Stafford, Sullivan, Swift, Thatcher, Thornton, Underwood, Vandermeer, Villanueva,
    Wainwright, Wallace, Weatherby, Whitaker, Winslow, Woodward, Wright, Yates, Zimmermann
""")

GREEK = _words("""
    Alpha, Epsilon, Omicron, Upsilon, Kappa, Lambda, Sigma, Omega
""")

CONSTELLATIONS = _words("""
    Lyrae, Cygni, Draconis, Orionis, Pegasi, Aquilae, Centauri, Eridani, Hydrae, Leonis, Ursae, Tauri, Velorum
""")

SUBJECTS = _words("""
    agriculture, air quality, archives, banking, biodiversity, broadcasting, census, coastal protection,
    consumer credit, copyright, privacy, education, elections, energy, fisheries, food hygiene, forestry,
    heritage, housing, insurance, labour, maritime traffic, medicines, mining, noise, pensions, postal services,
    procurement, public health, railways, recycling, telecommunications, tourism, trade, transport, water
""")

TRADES = _words("""
    Analytics, Aviation, Brewing, Ceramics, Chemicals, Electronics, Foods, Foundry, Freight, Furniture,
    Instruments, Logistics, Marine, Metals, Optics, Pharma, Plastics, Printing, Robotics, Semiconductors,
    Shipping, Software, Textiles, Toys
""")

LEGAL_FORMS = _words("""
    AG, GmbH, Inc., K.K., LLC, Ltd, N.V., Oy, PLC, S.A., S.p.A., & Sons, Group, Holdings
""")

GOODS = _words("""
    backpack, barometer, bicycle, blender, calculator, camera, chainsaw, coffee maker, drone, earphones,
    espresso machine, fan, flashlight, guitar, headset, humidifier, keyboard, kayak, lawnmower, microphone,
    microscope, modem, monitor, mower, phone, printer, projector, radio, router, scanner, scooter, sewing
    machine, smartwatch, speaker, stove, tablet, tent, thermostat, toaster, treadmill, tripod, vacuum, webcam
""")

MATERIALS = _words("""
    aluminium, bamboo, basalt, birchwood, brick, carbon fibre, cast iron, ceramic, concrete, cork, cotton,
    denim, glass, hemp, leather, limestone, linen, nylon, oakwood, paper, plywood, polyester, porcelain, rubber,
    sandstone, silicon, silk, slate, stainless steel, teak, terracotta, titanium, tweed, wool, zinc
""")

COLOURS = _words("""
    beige, black, burgundy, charcoal grey, cream, dark green, lime, magenta, maroon, midnight blue, mint green,
    navy, off-white, pale pink, rust red, sky blue, teal, turquoise
""")

LANGUAGES = _words("""
    Arabic, Basque, Bengali, Catalan, Czech, Danish, Dutch, English, Estonian, Finnish, French, Galician,
    Georgian, German, Greek, Hausa, Hebrew, Hindi, Hungarian, Icelandic, Igbo, Irish, Italian, Japanese,
    Kannada, Korean, Latvian, Malay, Maltese, Mandarin, Nepali, Norwegian, Persian, Polish, Portuguese, Quechua,
    Romanian, Serbian, Slovak, Spanish, Swahili, Swedish, Tamil, Thai, Turkish, Ukrainian, Urdu, Vietnamese,
    Welsh, Yoruba, Zulu
""")

COUNTRIES = _words("""
    Albania, Argentina, Australia, Austria, Bangladesh, Belgium, Bolivia, Botswana, Brazil, Bulgaria, Cambodia,
    Canada, Chile, Colombia, Croatia, Cuba, Cyprus, Denmark, Ecuador, Egypt, Estonia, Ethiopia, Fiji, Finland,
    France, Ghana, Greece, Guatemala, Iceland, India, Indonesia, Ireland, Israel, Italy, Jamaica, Japan, Jordan,
    Kenya, Laos, Latvia, Lebanon, Lithuania, Madagascar, Malaysia, Mali, Malta, Mexico, Mongolia, Morocco,
    Namibia, Nepal, Nigeria, Norway, Oman, Pakistan, Panama, Paraguay, Peru, Philippines, Poland, Portugal,
    Romania, Rwanda, Samoa, Senegal, Serbia, Singapore, Slovenia, Spain, Sudan, Sweden, Switzerland, Tanzania,
    Thailand, Tunisia, Turkey, Uganda, Uruguay, Vietnam, Zambia
""")

CURRENCIES = _words("""
    crown, dinar, dollar, euro, florin, franc, guilder, lira, peso, pound, real, rupee, shilling, yen
""")

OCCUPATIONS = _words("""
    accountant, actor, architect, astronomer, baker, beekeeper, biologist, blacksmith, bookbinder, botanist,
    carpenter, cartographer, cellist, chemist, choreographer, composer, dentist, diplomat, economist, editor,
    electrician, engineer, ethnographer, farmer, firefighter, fisherman, geologist, glassblower, historian,
    illustrator, journalist, judge, lawyer, librarian, linguist, locksmith, mathematician, mechanic,
    meteorologist, midwife, novelist, nurse, painter, pharmacist, philosopher, photographer, physicist, pilot,
    poet, potter, sailor, sculptor, shepherd, statistician, surgeon, surveyor, tailor, teacher, translator,
    veterinarian, violinist, watchmaker, welder
""")

ORGANS = _words("""
    heart, kidney, liver, lung, pancreas, retina, skin, spleen, stomach, thymus
""")

GENRES = _words("""
    adventure, biography, comedy, crime drama, documentary, fantasy, folk horror, historical epic, musical,
    mystery, puzzle, romance, satire, science fiction, strategy, thriller, travelogue, western
""")

INSTRUMENTS = _words("""
    accordion, banjo, bassoon, cello, clarinet, drums, flute, harmonica, lute, mandolin, oboe, piano, saxophone,
    synthesizer, trombone, trumpet, tuba, ukulele, viola, violin
""")

SPORTS = _words("""
    archery, badminton, basketball, cricket, curling, cycling, fencing, football, handball, hockey, judo,
    rowing, rugby, sailing, skating, skiing, squash, swimming, tennis, volleyball
""")

FOODS = _words("""
    barley flour, black beans, cabbage, cardamom, chickpeas, coconut milk, cod, crab, dates, eggplant, fennel,
    fish sauce, garlic, goat cheese, lamb, lentils, lime juice, mackerel, millet, mushrooms, mustard seeds,
    okra, pork belly, pumpkin, rice, rye bread, saffron, sesame oil, tamarind, turnips
""")

VERBS = _words("""
    built, catalogued, closed, defended, designed, discovered, documented, financed, founded, guarded,
    inherited, joined, mapped, moved, painted, published, rebuilt, repaired, restored, sold, studied, tested
""")

PURPOSES = _words("""
    to carry grain between the islands, to catalogue old manuscripts, to connect remote villages by radio, to
    cut the cost of clean water, to detect leaks in long pipelines, to feed the crews of night trains, to guide
    ships through shallow straits, to help farmers predict late frost, to keep vaccines cool without power, to
    make maps that blind travellers can read, to measure the height of waves, to monitor the health of bees, to
    preserve songs that were never written down, to protect nesting sea birds, to recycle worn-out batteries, to
    reduce noise near hospitals, to sort letters in four alphabets, to store heat for the winter, to teach
    children how machines work, to test bridges after earthquakes, to train guides for the caves, to translate
    legal texts, to turn seaweed into packaging, to warn of landslides
""")

STATUSES = _words("""
    active, awaiting approval, decommissioned, in maintenance, on loan, out of print, retired, under
    construction, under review
""")

WEEKDAYS = _words("""
    Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday
""")

MONTHS = _words("""
    January, February, March, April, May, June, July, August, September, October, November, December
""")

CLIMATES = _words("""
    alpine, arid, cold semi-arid, humid continental, humid subtropical, mediterranean, monsoon, oceanic,
    subarctic, tropical rainforest, tropical savanna
""")

ROCKS = _words("""
    andesite, basalt, chalk, dolomite, gneiss, granite, limestone, marble, sandstone, schist, slate, tuff
""")

HABITATS = _words("""
    alpine meadows, brackish lagoons, cloud forest, coral reefs, deciduous woodland, desert scrub, kelp beds,
    mangrove swamps, open steppe, peat bogs, river deltas, salt marshes
""")

STYLES = _words("""
    art deco, baroque, brutalist, cubist, folk, gothic revival, impressionist, jazz fusion, minimalist,
    modernist, neoclassical, post-punk, progressive, renaissance, romantic, surrealist
""")

LICENSES = _words("""
    Apache-2.0, BSD-3-Clause, CC BY 4.0, EUPL-1.2, GPL-3.0, LGPL-2.1, MIT, MPL-2.0, proprietary
""")

PROGRAMMING_LANGUAGES = _words("""
    Ada, C, C++, C#, Clojure, Cobol, Elixir, Erlang, F#, Fortran, Go, Haskell, Java, Julia, Kotlin, Lua, OCaml,
    Perl, PHP, Python, R, Ruby, Rust, Scala, Swift, TypeScript, Zig
""")
