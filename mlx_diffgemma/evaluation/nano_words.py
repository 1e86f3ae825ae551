"""The words from which nano's tasks are made."""

NAMES = """Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olive Paul Rosa Sam Tina Viktor Zoe
Alex Bella Carl Dora Eli Fiona George Hanna Ivan Julia Karl Lena Max Nina Oscar Pia Robert Sara Tom""".split()
CITIES = """Paris London Rome Berlin Madrid Vienna Oslo Athens Dublin Prague Lisbon Warsaw Boston Tokyo Cairo Lima
Denver Seattle Toronto Sydney Delhi Kyoto Bergen Geneva Milan""".split()
ANIMALS = "fox cat dog bear mouse rabbit owl duck frog goat horse lion wolf deer hen pig sheep turtle".split()
COLOURS = "red blue green yellow white black brown grey pink orange".split()
OBJECTS = "ball kite lamp drum boat book coin ring key map hat bell box cup rope shell stone flower".split()
PLACES = (
    "forest garden house river hill field cave beach market bridge barn village lake tower".split()
)
FOODS = "bread cheese apples honey soup cake berries nuts milk rice".split()
JOBS = "teacher doctor farmer baker painter driver sailor writer singer cook".split()
MOODS = "happy sad brave shy tired hungry curious proud calm lonely".split()
WORDS = sorted(
    {
        *ANIMALS,
        *COLOURS,
        *OBJECTS,
        *PLACES,
        *FOODS,
        *JOBS,
        *MOODS,
        *"""sun moon star tree road wind rain snow
sea day night time hand door wall glass paper wood fire leaf big small old new long short fast slow warm cold good soft
loud dark light quick the and one two three here there up down left right early late""".split(),
    }
)
COPY_EXTRA = (
    "café naïve Zürich señor über łódź 猫 犬 été ñandú Ørsted 日本 привет мир ✓ → € 😀".split()
)
