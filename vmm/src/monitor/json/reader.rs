//! Tokens to messages: finds where a message ends, then parses it.

use serde_json::{Map, Number, Value};

use super::JsonError;
use super::lexer::{Lexer, Token};

/// How big a message may be. What a [`Reader`] holds at any time is bounded by
/// these, whatever the client sends.
#[derive(Clone, Copy, Debug)]
pub(in crate::monitor) struct Limits {
    /// Bytes of all tokens of a message.
    pub(in crate::monitor) size: usize,
    /// Tokens of a message.
    pub(in crate::monitor) tokens: usize,
    /// Nested arrays and objects; also the depth of the parser's recursion.
    pub(in crate::monitor) depth: usize,
}

impl Default for Limits {
    /// Far above every real command; QEMU's are 64 MiB, 2 Mi and 1024.
    fn default() -> Self {
        Self {
            size: 1 << 20,
            tokens: 1 << 16,
            depth: 1024,
        }
    }
}

/// Splits a client's bytes into messages.
#[derive(Debug)]
pub(in crate::monitor) struct Reader {
    limits: Limits,
    lexer: Lexer,
    tokens: Vec<Token>,
    /// Bytes of `tokens`.
    size: usize,
    braces: isize,
    brackets: isize,
}

impl Reader {
    /// A reader at the beginning of a message.
    pub(in crate::monitor) fn new(limits: Limits) -> Self {
        Self {
            limits,
            lexer: Lexer::new(limits.size),
            tokens: Vec::new(),
            size: 0,
            braces: 0,
            brackets: 0,
        }
    }

    /// Takes bytes off the front of `input` until a message, good or bad, is
    /// complete. `None`: `input` is used up and more is needed.
    pub(in crate::monitor) fn next(
        &mut self,
        input: &mut &[u8],
    ) -> Option<Result<Value, JsonError>> {
        while let [byte, rest @ ..] = *input {
            let step = self.lexer.step(*byte);
            if step.consumed {
                *input = rest;
            }
            if let Some(token) = step.token
                && let Some(message) = self.take(token)
            {
                return Some(message);
            }
        }
        None
    }

    /// Adds a token; gives the message if that completes it.
    fn take(&mut self, token: Token) -> Option<Result<Value, JsonError>> {
        match &token {
            Token::LeftBrace => self.braces += 1,
            Token::RightBrace => self.braces -= 1,
            Token::LeftBracket => self.brackets += 1,
            Token::RightBracket => self.brackets -= 1,
            Token::Stray(text) => {
                let text = String::from_utf8_lossy(text);
                let error = JsonError::Syntax(format!("stray '{text}'"));
                self.reset();
                return Some(Err(error));
            }
            Token::TooLong => {
                self.reset();
                return Some(Err(JsonError::Size));
            }
            Token::Colon | Token::Comma => (),
            Token::Integer(text)
            | Token::Float(text)
            | Token::Keyword(text)
            | Token::String(text) => {
                self.size += text.len();
            }
        }
        let exceeded = if self.size + self.lexer.pending() > self.limits.size {
            Some(JsonError::Size)
        } else if self.tokens.len() >= self.limits.tokens {
            Some(JsonError::Tokens)
        } else if self.braces + self.brackets > self.limits.depth.cast_signed() {
            Some(JsonError::Depth)
        } else {
            None
        };
        if let Some(error) = exceeded {
            self.reset();
            return Some(Err(error));
        }
        self.tokens.push(token);
        let open = self.braces > 0 || self.brackets > 0;
        if open && self.braces >= 0 && self.brackets >= 0 {
            return None;
        }
        let tokens = std::mem::take(&mut self.tokens);
        self.reset();
        Some(
            Parser {
                tokens: tokens.into_iter(),
            }
            .value(),
        )
    }

    /// Forgets the message begun.
    fn reset(&mut self) {
        self.tokens = Vec::new();
        self.size = 0;
        self.braces = 0;
        self.brackets = 0;
    }
}

fn syntax(text: &str) -> JsonError {
    JsonError::Syntax(text.to_owned())
}

/// A recursive-descent parser; the depth of its recursion is bounded by
/// [`Limits::depth`], which the reader enforces before it.
struct Parser {
    tokens: std::vec::IntoIter<Token>,
}

impl Parser {
    fn next(&mut self) -> Result<Token, JsonError> {
        self.tokens.next().ok_or_else(|| syntax("premature EOI"))
    }

    fn value(&mut self) -> Result<Value, JsonError> {
        let token = self.next()?;
        self.value_from(token)
    }

    fn value_from(&mut self, token: Token) -> Result<Value, JsonError> {
        match token {
            Token::LeftBrace => self.object(),
            Token::LeftBracket => self.array(),
            Token::Integer(text) => integer(&text),
            Token::Float(text) => float(&text),
            Token::Keyword(text) => keyword(&text),
            Token::String(text) => unescape(&text).map(Value::String),
            _ => Err(syntax("expecting value")),
        }
    }

    fn object(&mut self) -> Result<Value, JsonError> {
        let mut members = Map::new();
        let mut token = self.next()?;
        if token == Token::RightBrace {
            return Ok(Value::Object(members));
        }
        loop {
            let Value::String(key) = self.value_from(token)? else {
                return Err(syntax("key is not a string in object"));
            };
            if self.next()? != Token::Colon {
                return Err(syntax("missing : in object pair"));
            }
            let value = self.value()?;
            if members.insert(key, value).is_some() {
                return Err(syntax("duplicate key"));
            }
            match self.next()? {
                Token::RightBrace => return Ok(Value::Object(members)),
                Token::Comma => token = self.next()?,
                _ => return Err(syntax("expected separator in dict")),
            }
        }
    }

    fn array(&mut self) -> Result<Value, JsonError> {
        let mut elements = Vec::new();
        let mut token = self.next()?;
        if token == Token::RightBracket {
            return Ok(Value::Array(elements));
        }
        loop {
            elements.push(self.value_from(token)?);
            match self.next()? {
                Token::RightBracket => return Ok(Value::Array(elements)),
                Token::Comma => token = self.next()?,
                _ => return Err(syntax("expected separator in list")),
            }
        }
    }
}

fn keyword(text: &[u8]) -> Result<Value, JsonError> {
    match text {
        b"true" => Ok(Value::Bool(true)),
        b"false" => Ok(Value::Bool(false)),
        b"null" => Ok(Value::Null),
        _ => Err(JsonError::Syntax(format!(
            "invalid keyword '{}'",
            String::from_utf8_lossy(text)
        ))),
    }
}

/// The smallest type that holds it: i64, u64, and a float for what is too big.
fn integer(text: &[u8]) -> Result<Value, JsonError> {
    let digits = String::from_utf8_lossy(text);
    if let Ok(value) = digits.parse::<i64>() {
        return Ok(Value::from(value));
    }
    match digits.parse::<u64>() {
        Ok(value) => Ok(Value::from(value)),
        Err(_) => float(text),
    }
}

fn float(text: &[u8]) -> Result<Value, JsonError> {
    String::from_utf8_lossy(text)
        .parse::<f64>()
        .ok()
        .and_then(Number::from_f64)
        .map(Value::Number)
        .ok_or_else(|| syntax("number is out of range"))
}

/// The text of a string token, without quotes and escapes.
fn unescape(token: &[u8]) -> Result<String, JsonError> {
    let inner = token
        .len()
        .checked_sub(1)
        .and_then(|end| token.get(1..end))
        .unwrap_or_default();
    let mut out = Vec::with_capacity(inner.len());
    let mut at = 0;
    while let Some(&byte) = inner.get(at) {
        if inner[at..].starts_with(MODIFIED_NUL) {
            out.push(0);
            at += MODIFIED_NUL.len();
            continue;
        }
        if byte != b'\\' {
            out.push(byte);
            at += 1;
            continue;
        }
        let plain = match inner.get(at + 1) {
            Some(byte @ (b'"' | b'\'' | b'\\' | b'/')) => *byte,
            Some(b'b') => 0x08,
            Some(b'f') => 0x0c,
            Some(b'n') => b'\n',
            Some(b'r') => b'\r',
            Some(b't') => b'\t',
            Some(b'u') => {
                // Positions in `token` are one further, for the quote.
                let (character, len) = unicode_escape(token, at + 1)?;
                let mut utf8 = [0; 4];
                out.extend_from_slice(character.encode_utf8(&mut utf8).as_bytes());
                at += len;
                continue;
            }
            _ => return Err(syntax("invalid escape sequence in string")),
        };
        out.push(plain);
        at += 2;
    }
    String::from_utf8(out)
        .ok()
        .filter(|text| !text.chars().any(is_noncharacter))
        .ok_or_else(|| syntax("invalid UTF-8 sequence in string"))
}

/// How a NUL character may be written besides `\u0000`, as in QEMU.
const MODIFIED_NUL: &[u8] = &[0xc0, 0x80];

/// Whether Unicode will never give it a meaning; QEMU refuses these.
fn is_noncharacter(character: char) -> bool {
    let code = u32::from(character);
    matches!(code, 0xfdd0..=0xfdef) || code & 0xfffe == 0xfffe
}

/// The character of the `\uXXXX`, or of the surrogate pair, at `at`, and how
/// many bytes the escape has.
fn unicode_escape(token: &[u8], at: usize) -> Result<(char, usize), JsonError> {
    let unit = |at: usize| -> Option<u32> {
        let digits = token.get(at..at + 6)?.strip_prefix(b"\\u")?;
        if !digits.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        u32::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
    };
    let (code, len) = match (unit(at), unit(at + 6)) {
        (Some(high @ 0xd800..=0xdbff), Some(low @ 0xdc00..=0xdfff)) => {
            let code = 0x1_0000 + ((high - 0xd800) << 10) + (low - 0xdc00);
            (Some(code), 12)
        }
        (code, _) => (code, 6),
    };
    let character = code
        .and_then(char::from_u32)
        .filter(|character| !is_noncharacter(*character));
    character.map(|character| (character, len)).ok_or_else(|| {
        let end = token.len().min(at + len);
        let shown = String::from_utf8_lossy(token.get(at..end).unwrap_or_default());
        JsonError::Syntax(format!("{shown} is not a valid Unicode character"))
    })
}
