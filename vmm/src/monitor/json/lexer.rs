//! Bytes to tokens.

/// One token; strings and numbers are kept as they were written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Token {
    LeftBrace,
    RightBrace,
    LeftBracket,
    RightBracket,
    Colon,
    Comma,
    Integer(Vec<u8>),
    Float(Vec<u8>),
    Keyword(Vec<u8>),
    /// With its quotes and escapes.
    String(Vec<u8>),
    /// Bytes that begin no token or break one off; the last is the culprit.
    Stray(Vec<u8>),
    /// A token longer than allowed.
    TooLong,
}

/// Where in a token the lexer is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Start,
    /// After a mistake: bytes are skipped up to one that may begin a message.
    Recovery,
    /// Inside a string that this quote ends.
    Quoted(u8),
    /// After a backslash in such a string.
    Escaped(u8),
    Keyword,
    /// After `-`.
    Minus,
    /// After a leading `0`.
    Zero,
    Digits,
    /// After the decimal point.
    Point,
    Fraction,
    /// After `e`.
    Exponent,
    /// After the exponent's sign.
    ExponentSign,
    ExponentDigits,
}

/// The lexer: a state and the bytes of the token begun.
#[derive(Debug)]
pub(super) struct Lexer {
    state: State,
    token: Vec<u8>,
    /// Longest token in bytes.
    max_len: usize,
}

/// What one byte did.
pub(super) struct Step {
    /// The token that it completed, or that ended before it.
    pub(super) token: Option<Token>,
    /// Whether the byte was used up; if not it has to be given again.
    pub(super) consumed: bool,
}

impl Lexer {
    pub(super) fn new(max_len: usize) -> Self {
        Self {
            state: State::Start,
            token: Vec::new(),
            max_len,
        }
    }

    /// Bytes held of a token that is not complete.
    pub(super) fn pending(&self) -> usize {
        self.token.len()
    }

    /// Takes one byte.
    pub(super) fn step(&mut self, byte: u8) -> Step {
        match self.state {
            State::Start => self.begin(byte),
            State::Recovery => {
                if resynchronises(byte) {
                    self.state = State::Start;
                    return Step {
                        token: None,
                        consumed: false,
                    };
                }
                Step {
                    token: None,
                    consumed: true,
                }
            }
            State::Quoted(quote) => match byte {
                b'\\' => self.push(byte, State::Escaped(quote)),
                _ if byte == quote => {
                    self.token.push(byte);
                    self.finish(Token::String)
                }
                0x20..=0xfd => self.push(byte, State::Quoted(quote)),
                _ => self.stray(byte),
            },
            State::Escaped(quote) => match byte {
                0x20..=0xfd => self.push(byte, State::Quoted(quote)),
                _ => self.stray(byte),
            },
            State::Keyword => match byte {
                b'a'..=b'z' => self.push(byte, State::Keyword),
                _ => self.ended_before(Token::Keyword),
            },
            State::Minus => match byte {
                b'0' => self.push(byte, State::Zero),
                b'1'..=b'9' => self.push(byte, State::Digits),
                _ => self.stray(byte),
            },
            State::Zero => match byte {
                b'.' => self.push(byte, State::Point),
                b'e' | b'E' => self.push(byte, State::Exponent),
                b'0'..=b'9' => self.stray(byte),
                _ => self.ended_before(Token::Integer),
            },
            State::Digits => match byte {
                b'0'..=b'9' => self.push(byte, State::Digits),
                b'.' => self.push(byte, State::Point),
                b'e' | b'E' => self.push(byte, State::Exponent),
                _ => self.ended_before(Token::Integer),
            },
            State::Point => match byte {
                b'0'..=b'9' => self.push(byte, State::Fraction),
                _ => self.stray(byte),
            },
            State::Fraction => match byte {
                b'0'..=b'9' => self.push(byte, State::Fraction),
                b'e' | b'E' => self.push(byte, State::Exponent),
                _ => self.ended_before(Token::Float),
            },
            State::Exponent => match byte {
                b'+' | b'-' => self.push(byte, State::ExponentSign),
                b'0'..=b'9' => self.push(byte, State::ExponentDigits),
                _ => self.stray(byte),
            },
            State::ExponentSign => match byte {
                b'0'..=b'9' => self.push(byte, State::ExponentDigits),
                _ => self.stray(byte),
            },
            State::ExponentDigits => match byte {
                b'0'..=b'9' => self.push(byte, State::ExponentDigits),
                _ => self.ended_before(Token::Float),
            },
        }
    }

    /// A byte between tokens.
    fn begin(&mut self, byte: u8) -> Step {
        let single = match byte {
            b' ' | b'\t' | b'\r' | b'\n' => {
                return Step {
                    token: None,
                    consumed: true,
                };
            }
            b'{' => Token::LeftBrace,
            b'}' => Token::RightBrace,
            b'[' => Token::LeftBracket,
            b']' => Token::RightBracket,
            b':' => Token::Colon,
            b',' => Token::Comma,
            b'"' | b'\'' => return self.push(byte, State::Quoted(byte)),
            b'-' => return self.push(byte, State::Minus),
            b'0' => return self.push(byte, State::Zero),
            b'1'..=b'9' => return self.push(byte, State::Digits),
            b'a'..=b'z' => return self.push(byte, State::Keyword),
            _ => return self.stray(byte),
        };
        Step {
            token: Some(single),
            consumed: true,
        }
    }

    fn push(&mut self, byte: u8, state: State) -> Step {
        if self.token.len() >= self.max_len {
            self.token = Vec::new();
            self.state = State::Recovery;
            return Step {
                token: Some(Token::TooLong),
                consumed: true,
            };
        }
        self.token.push(byte);
        self.state = state;
        Step {
            token: None,
            consumed: true,
        }
    }

    fn finish(&mut self, make: fn(Vec<u8>) -> Token) -> Step {
        self.state = State::Start;
        Step {
            token: Some(make(std::mem::take(&mut self.token))),
            consumed: true,
        }
    }

    /// The token ended with the byte before this one.
    fn ended_before(&mut self, make: fn(Vec<u8>) -> Token) -> Step {
        Step {
            consumed: false,
            ..self.finish(make)
        }
    }

    fn stray(&mut self, byte: u8) -> Step {
        // QEMU's text ends where a NUL byte is.
        if byte != 0 {
            self.token.push(byte);
        }
        self.state = State::Recovery;
        Step {
            token: Some(Token::Stray(std::mem::take(&mut self.token))),
            consumed: true,
        }
    }
}

/// Whether a skipped-over message can be over with this byte: an ASCII control
/// character but the tab, a structural character, or a byte that no UTF-8 text
/// has (clients send 0xff to resynchronise).
fn resynchronises(byte: u8) -> bool {
    matches!(
        byte,
        0x00..=0x08 | 0x0a..=0x1f | 0xfe | 0xff | b'{' | b'}' | b'[' | b']' | b':' | b','
    )
}
