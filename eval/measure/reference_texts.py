"""The texts that every original answers for its reference: prompts of several kinds, paragraphs and awkward strings."""

RAW = (
    "The capital of France is",
    "Water boils at a lower temperature on a mountain because",
    "def fibonacci(n):\n    ",
    "Once upon a time there was a fisherman who",
    "The three primary colours are red,",
    "1, 2, 3, 4, 5, 6,",
    "长江是中国最长的",
    "人工智能是",
    "La casa es grande y el jardín",
    '{"name": "Ada", "born": 1815, "city":',
    "To make a cup of tea, first boil the water, then",
    "Q: What is 12 + 30?\nA:",
)
MORE_RAW = (  # where there is no chat template
    "In the beginning of spring the",
    "The largest planet of the solar system is",
    "SELECT name, city FROM customers WHERE",
    "Die Hauptstadt von Deutschland ist",
    "The first computers were large machines that filled whole rooms, and",
    "机器学习的主要方法包括",
    "She opened the letter, read it twice, and",
    "A healthy diet consists of",
)
CHAT = (
    "What is the capital of France?",
    "Name three animals that live in the sea.",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that reverses a string.",
    "Translate into Spanish: The house is big.",
    "你好，请介绍一下你自己。",
    "中国的首都是哪里？",
    "为什么天空是蓝色的？",
    "How many legs do two spiders have?",
    "Give me a recipe for pancakes.",
    "Is a whale a fish? Answer yes or no.",
    "Write a short poem about the wind.",
)
ABOUT = ("{}\n\nSummarize this text in one sentence.", "{}\n\nWhat is the text about?\n请用一句话回答。")
SUBJECTS = ("Tell me about tea.", "请介绍一下茶。", "Write Python code that checks whether brackets are balanced.")
PARAGRAPHS = (
    # English prose
    "Tea is one of the most widely drunk beverages in the world. It is made by pouring hot water over the leaves of a"
    " plant that grows in warm, wet places, above all in China, India, Sri Lanka and Kenya. According to an old "
    "story, a Chinese emperor was boiling water in his garden when the wind blew a few leaves into the pot, and he "
    "liked what he tasted. For many centuries tea was used as a medicine, and only later did people begin to drink it"
    " for pleasure. Merchants brought it to Europe in the seventeenth century, where it was at first so expensive "
    "that only the rich could buy it. Today there are many kinds. Green tea is dried soon after the leaves are "
    "picked, while black tea is left to darken before it is dried. Some people drink it with milk and sugar, others "
    "with lemon, and in some countries it is served cold, with ice. Most kinds contain caffeine, which makes people "
    "feel more awake, although a cup of tea has less of it than a cup of coffee.",
    # Chinese prose
    "茶是世界上最受欢迎的饮料之一。它是用热水冲泡茶树的叶子制成的，茶树生长在温暖潮湿的地方，主要分布在中国、印度、斯里兰卡"
    "和肯尼亚。相传很久以前，一位中国皇帝正在花园里烧水，一阵风把几片树叶吹进了锅里，他尝了尝，觉得味道很好。在很长的时间里，"
    "茶被当作药物使用，后来人们才开始把它当作日常饮料。十七世纪，商人把茶叶带到了欧洲，当时茶叶非常昂贵，只有富人才买得起。"
    "今天，茶有很多种类。绿茶在采摘后很快就被烘干，而红茶要经过发酵才能制成。有些人喜欢在茶里加牛奶和糖，有些人喜欢加柠檬，"
    "在一些国家，人们还喜欢喝加冰的茶。大多数茶都含有咖啡因，可以让人感到更加清醒，不过一杯茶的咖啡因比一杯咖啡少。",
    # Python
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n"
    "        self.items.append(item)\n\n    def pop(self):\n        if not self.items:\n"
    '            raise IndexError("pop from an empty stack")\n        return self.items.pop()\n\n'
    "    def peek(self):\n        return self.items[-1]\n\n    def __len__(self):\n        return len(self.items)\n\n\n"
    "def is_balanced(text):\n    stack = Stack()\n    for character in text:\n"
    '        if character in "([{":\n            stack.push(character)\n        elif character in ")]}":\n'
    "            if len(stack) == 0:\n                return False\n            stack.pop()\n"
    "    return len(stack) == 0\n\n\n"
    'if __name__ == "__main__":\n    print(is_balanced("(a + b) * [c - d]"))\n',
)
AWKWARD = (
    "Café naïve — Ω≈ç√ 東京 дом 😀👩\u200d🚀 \u05e9\u05dc\u05d5\u05dd:",
    "  two  spaces   and a tab\tand\r\nlines\n\n\n",
    "1234567890 3.14159 0x1F 1e-9 ½ ١٢٣",
    "don't can't I'LL we've O'Neil",
    "cafe\u0301 ﬁ ﷺ \u00a0\u200b\ufeff|",
    'if (x != null && y[0] >= 2) { return "\\n"; }',
    "AaAaAaAaAaAaAaAaAaAaAaAaAaAaAaAa",
    "https://example.org/a?b=c&d=%20#e  user@example.org",
)
