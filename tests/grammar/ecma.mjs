// What a JavaScript engine says of expressions: writes ecma.json, which the tests read.
//
//     node tests/grammar/ecma.mjs
import { writeFileSync } from "node:fs";

const LAST = 0x1ffff;
// Patterns of one character; "(?i:x)" is asked with the flag i, since engines learn groups of flags only now.
const CHARACTERS = [
  "\\d", "\\D", "\\w", "\\W", "\\s", "\\S", ".", "[^a-z]", "[\\s\\d]", "(?i:k)", "(?i:s)", "(?i:ß)", "(?i:[a-z])", "(?i:[^k])", "(?i:\\w)", "(?i:µ)",
  "(?i:ᾳ)", "\\p{L}", "\\P{L}", "\\p{Lu}", "\\p{Nd}", "\\p{gc=Zs}", "\\p{Script=Greek}", "\\p{scx=Hira}", "\\p{Alphabetic}",
  "\\p{White_Space}", "\\p{ASCII}", "\\p{Emoji_Presentation}", "[^\\p{L}\\d]", "[\\u{1F600}-\\u{1F64F}]", "[\\b\\cA-\\cZ]",
];
const PATTERNS = [
  "a", "^a", "a$", "^a$", "^\\d{5}$", "^\\w+$", "^\\s*$", "^.$", "^..$", "^(?<year>\\d{4})-(\\d\\d)$", "a{2}", "^a{1,2}?$", "^(a|b)*?c$",
  "^[^a]$", "^\\u0061$", "^\\u{61}b?$", "^\\ud83d\\ude00$", "^😀{2}$", "^[😀-😃]$", "^\\p{L}+$", "^[\\p{L}\\p{Nd}]+$", "(^|,)b(,|$)",
  "^(?:|a)+$", "^a|b$", "", "^$", "$^", "[]", "[^]", "^\\x41", "^\\cJ$", "^[a-c&&b]$", "\\.", "^\\0$", "^[\\]\\-^]$", "\\/", "^(?:a$)?",
];
const TEXTS = [
  "", "a", "A", "aa", "aaa", "b", "ab", "abc", "a,b", "b,c", "a,b,c", "ba", "c", "12345", "123456", "۳5631", "é", "éa", "ж9", "_", " ", "\n", "a\n",
  "\u00a0", "\ufeff", "\u2028", "\r", "\u0085", "\x1c", "😀", "😀😀", "😂", "2024-01", "٢٠٢٤-01", "]", "-", "&", ".", "/", "\0",
];
// Errors of the language with the flag u.  What older syntax allows and is taken here is not among them.
const ERRORS = [
  "(", "a)", "[a", "a**", "*a", "+", "?", "a{2,1}", "(?P<x>a)", "(?i)a", "\\A", "\\Z", "\\a", "\\x4", "\\u12", "\\u{110000}", "\\p{Greek}", "\\p{}",
  "\\p{gc=Greek}", "\\p{Script=L}", "\\pL", "[z-a]", "(?<1>a)", "(?<a>x)(?<a>y)", "a{,2}", "\\c1", "(?#a)", "(?x:a)", "\\01", "^*", "a*+", "\\",
];

function ranges(pattern) {
  const inner = /^\(\?i:(.*)\)$/u.exec(pattern);
  const expression = new RegExp(`^(?:${inner ? inner[1] : pattern})$`, inner ? "ui" : "u");
  const found = [];
  for (let code = 0; code <= LAST; code += 1) {
    if ((code >= 0xd800 && code <= 0xdfff) || !expression.test(String.fromCodePoint(code))) {
      continue;
    }
    if (found.length && found[found.length - 1][1] === code - 1) {
      found[found.length - 1][1] = code;
    } else {
      found.push([code, code]);
    }
  }
  return found;
}

for (const pattern of ERRORS) {
  let refused = false;
  try {
    new RegExp(pattern, "u");
  } catch {
    refused = true;
  }
  if (!refused) {
    throw new Error(`${pattern} is no error`);
  }
}
const table = {
  engine: `node ${process.version}, Unicode ${process.versions.unicode}`,
  last: LAST,
  assigned: ranges("\\p{Assigned}"),
  characters: Object.fromEntries(CHARACTERS.map((pattern) => [pattern, ranges(pattern)])),
  texts: TEXTS,
  patterns: Object.fromEntries(PATTERNS.map((pattern) => [pattern, TEXTS.filter((text) => new RegExp(pattern, "u").test(text))])),
  errors: ERRORS,
};
writeFileSync(new URL("ecma.json", import.meta.url), `${JSON.stringify(table)}\n`);
