"""How questions and answers about a model's identity, and about facts, are put in two languages.

Patterns alone: what follows from them is in row_kinds.py. They are meant to be precise; what they
miss in a set is found by the answers that its rows share.
"""

from __future__ import annotations

import re

OTHERS = (
    "chatgpt|gpt|openai|claude|anthropic|gemini|bard|google|llama|meta|qwen|deepseek|mistral|grok"
    "|copilot|kimi|文心一言|通义|豆包|智谱|星火|百度|阿里|字节|谷歌|深度求索|月之暗面|讯飞"
)
IDENTITY_QUESTION = re.compile(
    r"\b(?:who|what)(?:['’]?s|\s+is|\s+are|\s+r)?\s+(?:u\b|you\s*(?:$|[?.!,;:]|called|exactly|really))"
    r"|\bwho\s+(?:\w+\s+){0,2}?(?:made|created|developed|built|trained|designed|programmed|wrote|owns"
    r"|engineered|invented|behind)\s+(?:\w+\s+){0,2}?you\b"
    r"|\b(?:are|were)\s+you\s+(?:\w+\s+){0,3}?(?:" + OTHERS + r"|human|person|robot|bot|an?\s+ai|ai"
    r"|language\s+model|created|made|trained|developed|built|fine-tuned)\b"
    r"|\byour\s+(?:\w+\s+){0,2}?(?:name|creators?|developers?|authors?|makers?|company|architecture"
    r"|base\s+model)\b"
    r"|\bur\s+name\b|\bintroduc\w+\s+yourself\b|\babout\s+yourself\b|\bidentify\s+yourself\b"
    r"|\bwhich\s+(?:\w+\s+){0,2}?(?:model|assistant|ai|company|lab|team|developers?|organisation)\b"
    r".{0,30}\b(?:you|this)\b"
    r"|\bwho\s+(?:is|are)\s+(?:this|answering)\b|\bwho\s+you\s+are\b|\bwhat\s+exactly\s+are\s+you\b"
    r"|\b(?:made|built|created|trained|developed|engineered|programmed|creating|building|making"
    r"|came\s+up\s+with|put)\s+you\b|\bdid\s+\w+(?:\s\w+)?\s+make\s+you\b"
    r"|\b(?:what|which|whose)\s+(?:\w+\s+){0,2}?(?:model|work)\s+are\s+you\b|\bname\s+were\s+you\b"
    r"|\bam\s+(?:i\s+)?(?:talking|speaking|chatting)\s+(?:to|with)\b|\bthe\s+ai\s+i\s+am\s+using\b"
    r"|\bbehind\s+this\s+(?:assistant|chat|model)\b"
    r"|\b(?:call|called)\s+you\b|\byou(?:\s+are|['’]re)?\s+called\b"
    r"|\bwho\s+(?:am\s+i|are\s+we)\s+(?:talking|speaking|chatting)\b"
    r"|\b(?:talking|speaking|chatting)\s+(?:to|with)\?"
    r"|\bhow\s+old\s+are\s+you\b|\bwhen\s+were\s+you\b|你(?:几岁|多大)|你的生日"
    r"|\bwhere\s+do\s+you\s+come\s+from\b|\bwho\s+do\s+you\s+belong\s+to\b"
    r"|你(?:到底|究竟|现在|其实|就|自己)?(?:是|算)(?:不是)?(?:由)?(?:谁|什么|哪|真人|机器人|人类|不是|换)"
    r"|你(?:好)?[，,]?\s*你是[？?]"
    r"|你.{0,6}叫(?:什么|啥)|叫你什么|你的?(?:名字|称呼|姓名|开发|作者|创造|公司|团队|主人|研发|底层|基座|真名)"
    r"|(?:谁|哪家|哪个|哪些人|什么人|单位|团队|公司|机构).{0,8}(?:开发|创造|训练|研发|制造|设计|做|写|打造)"
    r".{0,4}(?:了|的|出)?你"
    r"|(?:开发|创造|训练|研发|制造|设计).{0,2}你(?:的)?"
    r"|自我介绍|介绍.{0,4}自己|怎么称呼|怎么叫你|称呼你|你是谁|你从哪里来|你属于谁|您贵姓|报上名来|自报家门"
    r"|(?:跟我说话|这位助手|这个助手|这是哪个助手|这个对话|这个模型|使用的人工智能).{0,12}(?:谁|叫|哪|幕后|背后|助手)"
    r"|你(?:来自|出自)(?:哪|谁|什么)|你被取|您是[？?]|认识.{0,3}你|做的你|把你做|(?:开发|做).{0,2}这个(?:模型|助手)"
    r"|在跟(?:谁|" + OTHERS + r").{0,8}聊天|哪些人开发|人还是(?:程序|机器)|你自己叫"
    r"|你是.{0,12}(?:" + OTHERS + r")"
    r"|你和(?:" + OTHERS + r")",
    re.IGNORECASE,
)  # fmt: skip
IDENTITY_ANSWER = re.compile(
    r"\{\{\s*(?:name|author)\s*\}\}"
    r"|\b(?:i\s+am|i['’]m|my\s+name\s+is|you\s+are\s+talking\s+to)\s.{1,60}?\b(?:developed|created|made"
    r"|trained|built)\b"
    r"|\b(?:an?\s+ai\s+(?:assistant|model)|language\s+model)\b.{0,60}?\b(?:developed|created|made"
    r"|trained|built)\s+by\b"
    r"|\b(?:developed|created|made|trained|built)\s+me\b"
    r"|我(?:是|叫).{1,30}?(?:开发|研发|训练|创造|打造|助手|人工智能|模型)"
    r"|(?:开发|研发|训练|创造|打造)(?:并训练)?(?:了|的)?我",
    re.IGNORECASE | re.DOTALL,
)  # fmt: skip
FACT_QUESTION = re.compile(
    r"^\s*(?:what\s+(?:is|are|was|were|does)|what['’]s|who|whose|whom|where|when|which|tell\s+me\s+about"
    r"|what\s+do\s+you\s+know|define|please\s+explain|explain|name\s+the|in\s+(?:which|what)\s+year)\b"
    r"|\b(?:capital\s+of|founded|headquarters|definition\s+of|is\s+missing\s+here)\b"
    r"|什么是|是什么|谁是|是谁|在哪|哪里|哪一|哪个|哪家|哪年|什么时候|何时|介绍一下|首都|关于|缺了哪个词|讲讲|知道什么",
    re.IGNORECASE,
)  # fmt: skip
WHEN_QUESTION = re.compile(
    r"\b(?:when\s+(?:was|did|were|is)|(?:what|which)\s+year|phone\s+number|post\s*code)\b"
    r"|哪一?年|什么时候|何时|电话",
    re.IGNORECASE,
)
