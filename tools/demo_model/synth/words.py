"""Word tables of the generators (own work; facts are common knowledge)."""


def _table(text):
    """'a:b|c:d' -> {'a': 'b', 'c': 'd'}"""
    return dict(item.split(":") for item in text.replace("\n", "").split("|"))


GIRLS = """Mia Anna Lily Rosa Nora Ella Sara Ivy Zoe Clara Maya Lucy Emma Ruth Tessa June Alma Dora Hana Ines
Greta Sofia Leila Vera Amira Olga Petra Nina Iris Freya""".split()
BOYS = """Tom Ben Leo Max Sam Oscar Finn Noah Paul Hugo Ravi Omar Luis Jack Theo Adam Karl Milo Ned Emil
Anton Felix Jonas Kofi Marco Pablo Rolf Simon Tariq Viktor""".split()
NAMES = GIRLS + BOYS
SURNAMES = """Miller Novak Silva Berg Rossi Khan Tanaka Dubois Larsen Kim Weber Costa Ali Moreau Jensen Haas
Lopez Okafor Petrov Sato Brandt Fischer Lindgren Mendes Nowak Owens Patel Quinn Russo Schmidt Taylor Vogel""".split()
ANIMALS = """rabbit fox bear mouse owl duck hedgehog squirrel turtle frog cat dog goat lamb pony crow otter beaver
mole deer badger swan donkey sparrow wolf""".split()
ADJECTIVES = "little small brave shy kind clever curious quiet cheerful gentle young sleepy busy careful".split()
OBJECTS = """kite ball lantern book basket drum hat scarf boat key bell blanket umbrella whistle ladder teapot
puzzle map compass painting""".split()
COLORS = "red blue green yellow white purple orange brown silver golden".split()
FOODS = """apple pie|warm bread|vegetable soup|honey cake|blueberry jam|cheese sandwiches|pumpkin stew|oat cookies
|pear juice|hot cocoa|plum tart|rice pudding""".replace("\n", "").split("|")
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June July August September October November December""".split()
NOUNS = """anchor apron arrow barrel beacon bench blossom bottle branch bridge bucket button cabin candle canyon
carpet castle ceiling cellar chapel cherry chimney circle clover comet copper corner cotton crystal curtain desert
dragon engine feather fiddle flower forest fountain garden garlic ginger glacier guitar hammer harbor helmet hollow
honey island ivory jacket jungle kettle ladder lagoon lemon lighthouse maple marble meadow mirror monsoon mountain
needle nutmeg ocean orchard paddle parrot pebble pepper piano pigeon pillow pirate planet pocket pottery prairie
quarry ribbon river rocket saddle salmon shadow shelter signal silver slipper spider spring statue summer sunset
temple thunder ticket timber tunnel turnip valley velvet violin walnut window winter wizard""".split()
EXTENSIONS = "txt pdf csv md png json log zip".split()
FOLDERS = "docs work photos projects archive backup music reports notes home".split()

CAPITALS = _table("""France:Paris|Germany:Berlin|Italy:Rome|Spain:Madrid|Portugal:Lisbon|Austria:Vienna|Greece:Athens|
Norway:Oslo|Sweden:Stockholm|Finland:Helsinki|Denmark:Copenhagen|Poland:Warsaw|Hungary:Budapest|Ireland:Dublin|
Iceland:Reykjavik|Japan:Tokyo|China:Beijing|India:New Delhi|Nepal:Kathmandu|Thailand:Bangkok|Vietnam:Hanoi|Egypt:Cairo|
Kenya:Nairobi|Ghana:Accra|Morocco:Rabat|Canada:Ottawa|Mexico:Mexico City|Cuba:Havana|Peru:Lima|Chile:Santiago|
Argentina:Buenos Aires|Brazil:Brasilia|Colombia:Bogota|Ecuador:Quito|Uruguay:Montevideo|Australia:Canberra|
New Zealand:Wellington|Turkey:Ankara|Iran:Tehran|Iraq:Baghdad|Jordan:Amman|Ukraine:Kyiv|Romania:Bucharest|
Bulgaria:Sofia|Serbia:Belgrade|Croatia:Zagreb|Czechia:Prague|Belgium:Brussels|the Netherlands:Amsterdam|
Estonia:Tallinn|Latvia:Riga|Lithuania:Vilnius|South Korea:Seoul|Indonesia:Jakarta|the Philippines:Manila|
Malaysia:Kuala Lumpur|Mongolia:Ulaanbaatar|Senegal:Dakar|Tunisia:Tunis|Algeria:Algiers""")
CITIES = sorted(CAPITALS.values()) + """Hamburg Milan Lyon Porto Geneva Boston Chicago Seattle Toronto Sydney Mumbai
Osaka Munich Bergen Krakow Seville Naples Dallas Denver London Edinburgh Zurich Bristol Valencia Marseille""".split()
OPPOSITES = _table("""hot:cold|big:small|fast:slow|happy:sad|light:dark|old:young|open:closed|early:late|wet:dry|
strong:weak|near:far|full:empty|loud:quiet|rich:poor|soft:hard|deep:shallow|sharp:dull|clean:dirty|high:low|
thick:thin|wide:narrow|first:last|up:down|left:right|day:night|win:lose|buy:sell|start:finish|love:hate""")

DEFINITIONS = _table("""a volcano:an opening in the ground through which hot melted rock, ash and gas can come out|
a river:a long stream of fresh water that flows from higher land to a lake or the sea|
a library:a place where people can read and borrow books|
a solid state drive:a storage device that keeps data in flash memory chips and has no moving parts|
a hard disk:a storage device that keeps data on spinning magnetic plates|
memory:the part of a computer that holds the data it is working on right now|
a processor:the part of a computer that carries out the instructions of a program|
a program:a list of instructions that tells a computer what to do|
an operating system:the program that manages a computer and lets other programs run|
a file:a named collection of data kept on a disk|
a neural network:a program made of many simple units whose strengths are learned from examples|
a language model:a program that predicts the next word of a text from the words before it|
a token:a piece of text, such as a word or a part of a word, that a language model reads or writes at once|
a mixture of experts:a language model that has many small parts and uses only a few of them for each word|
quantization:storing numbers with fewer bits so that a model needs less memory|
an expert:in a language model, a small part of the network that is used only for some of the words|
a router:in a language model, the part that chooses which experts work on a word|
a cache:a small fast store that keeps things that will soon be needed again|
a database:an organized collection of data that programs can search and change|
a compiler:a program that translates source code into instructions for a machine|
the internet:a worldwide network that connects computers|
a bridge:a structure that lets people cross a river, a road or a valley|
a telescope:a tool that makes far away things look closer|
a microscope:a tool that makes very small things look larger|
a compass:a tool with a needle that points to the north|
a magnet:an object that pulls things made of iron|
a desert:a dry place where very little rain falls|
an island:land with water all around it|
a glacier:a large and slow river of ice|
a planet:a large round body that moves around a star|
a star:a huge ball of hot gas that gives off light|
the moon:the round body that moves around the Earth|
gravity:the force that pulls things toward each other and keeps us on the ground|
electricity:a form of energy that comes from the movement of charged particles|
rain:water that falls from clouds in small drops|
a cloud:a group of tiny drops of water or ice in the air|
photosynthesis:the way plants make food from light, water and air|
a seed:the small part of a plant from which a new plant can grow|
a mammal:a warm animal that feeds its young with milk|
an insect:a small animal with six legs|
a map:a drawing that shows where places are|
a calendar:a table that shows the days, weeks and months of a year|
an alphabet:the set of letters used to write a language|
a noun:a word that names a person, a place or a thing|
a verb:a word for something you do or something that happens|
a fraction:a part of a whole, such as one half|
a triangle:a shape with three sides|
a circle:a round shape whose edge is always the same distance from its center|
a recipe:a list of steps that tells you how to cook something|
a thermometer:a tool that measures how warm something is|
a novel:a long story in prose, usually published as a book|
a poem:a short text in verse that often uses rhythm and images""")
