//! Requests and replies of one connection.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use futures_util::future::{Either, join_all, select};
use std::pin::pin;

use super::super::handshake::{Export, HeaderStyle};
use super::super::queue::{Answer, Command, Queue, Status};
use super::super::transmission::{Connection, End};
use super::with_server;
use crate::buffer::{AlignedBuffer, IoVec};
use crate::nbd::protocol::{self, ChunkHeader, SimpleReplyHeader, chunk, command};

fn export(style: HeaderStyle) -> Export {
    Export {
        size: 1 << 20,
        flags: 1,
        min_block: 1,
        preferred_block: 4096,
        max_payload: 1 << 20,
        style,
        context: Some(7),
    }
}

fn read_command(offset: u64, len: usize) -> (Command, IoVec) {
    let iov = AlignedBuffer::new(len).io_vec(len);
    iov.fill(0xee);
    let command = Command {
        kind: command::READ,
        flags: 0,
        offset,
        len: len as u64,
        iov: Some(iov.clone()),
        _range: None,
    };
    (command, iov)
}

fn status_command() -> Command {
    Command {
        kind: command::BLOCK_STATUS,
        flags: 0,
        offset: 512,
        len: 4096,
        iov: None,
        _range: None,
    }
}

/// What became of the commands, and why the connection ended if it did.
struct Outcome {
    answers: Vec<Option<Answer>>,
    broken: Option<String>,
    unanswered: usize,
}

/// Sends `commands`; the server gets them and says what it likes.
fn exchange(
    style: HeaderStyle,
    commands: Vec<Command>,
    server: impl FnOnce(Vec<protocol::Request>) -> Vec<u8> + Send + 'static,
) -> Outcome {
    let count = commands.len();
    with_server(
        move |mut stream: UnixStream| {
            let requests = (0..count)
                .map(|_| match style {
                    HeaderStyle::Extended => {
                        let mut header = [0; 32];
                        stream.read_exact(&mut header).unwrap();
                        protocol::Request::decode_extended(&header).unwrap()
                    }
                    _ => {
                        let mut header = [0; 28];
                        stream.read_exact(&mut header).unwrap();
                        protocol::Request::decode_compact(&header).unwrap()
                    }
                })
                .collect();
            // A client that has seen enough hangs up first.
            let _ = stream.write_all(&server(requests));
            let _ = stream.read_to_end(&mut Vec::new());
        },
        |socket| async move {
            let queue = Arc::new(Queue::new());
            let waiting: Vec<_> = commands
                .into_iter()
                .map(|command| queue.submit(command))
                .collect();
            let connection = Connection::new(socket, export(style));
            let answers = async {
                let answers = join_all(waiting).await;
                // An error is a request that was given back.
                answers.into_iter().map(Result::ok).collect::<Vec<_>>()
            };
            let mut answers = pin!(answers);
            let run = pin!(connection.run(&queue));
            let (broken, unanswered) = match select(answers.as_mut(), run).await {
                Either::Left((answers, _)) => {
                    queue.close();
                    return Outcome {
                        answers,
                        broken: None,
                        unanswered: 0,
                    };
                }
                Either::Right((End::Broken(error, left), _)) => {
                    (Some(error.to_string()), left.len())
                }
                Either::Right((End::Closed, _)) => (None, 0),
            };
            Outcome {
                answers: answers.await,
                broken,
                unanswered,
            }
        },
    )
}

fn simple(error: u32, cookie: u64, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    SimpleReplyHeader { error, cookie }.encode(&mut out);
    out.extend_from_slice(data);
    out
}

fn structured(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    ChunkHeader {
        flags,
        kind,
        cookie,
        offset: 0,
        len: payload.len() as u64,
    }
    .encode_structured(&mut out);
    out.extend_from_slice(payload);
    out
}

fn data(offset: u64, bytes: &[u8]) -> Vec<u8> {
    [&offset.to_be_bytes(), bytes].concat()
}

fn hole(offset: u64, len: u32) -> Vec<u8> {
    [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn extents(context: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut out = context.to_be_bytes().to_vec();
    for (len, flags) in extents {
        out.extend(len.to_be_bytes());
        out.extend(flags.to_be_bytes());
    }
    out
}

fn bytes(iov: &IoVec) -> Vec<u8> {
    let mut bytes = vec![0; iov.len()];
    iov.copy_to(0, &mut bytes);
    bytes
}

#[test]
fn replies_in_any_order_reach_their_requests() {
    let (commands, memory): (Vec<_>, Vec<_>) = (0..10).map(|i| read_command(i * 512, 512)).unzip();
    let outcome = exchange(HeaderStyle::Simple, commands, |requests| {
        let answer = |r: &protocol::Request| simple(0, r.cookie, &[(r.offset / 512) as u8; 512]);
        requests.iter().rev().flat_map(answer).collect()
    });
    assert!(outcome.answers.iter().all(|a| *a == Some(Ok(None))));
    for (i, iov) in memory.iter().enumerate() {
        assert_eq!(bytes(iov), [i as u8; 512]);
    }
}

#[test]
fn a_read_is_put_together_from_chunks_of_several_replies() {
    let (one, first) = read_command(1000, 3000);
    let (two, second) = read_command(0, 512);
    let outcome = exchange(HeaderStyle::Structured, vec![one, two], |requests| {
        let (one, two) = (requests[0].cookie, requests[1].cookie);
        [
            structured(0, chunk::OFFSET_DATA, one, &data(2000, &[2; 1000])),
            structured(1, chunk::OFFSET_DATA, two, &data(0, &[9; 512])),
            structured(0, chunk::OFFSET_HOLE, one, &hole(1000, 1000)),
            structured(0, chunk::OFFSET_DATA, one, &data(3000, &[3; 1000])),
            structured(1, chunk::NONE, one, &[]),
        ]
        .concat()
    });
    assert_eq!(outcome.answers, [Some(Ok(None)), Some(Ok(None))]);
    let first = bytes(&first);
    assert!(first[..1000].iter().all(|byte| *byte == 0));
    assert!(first[1000..2000].iter().all(|byte| *byte == 2));
    assert!(first[2000..].iter().all(|byte| *byte == 3));
    assert_eq!(bytes(&second), [9; 512]);
}

#[test]
fn the_servers_errors_are_the_requests() {
    let commands = (0..3).map(|i| read_command(i * 512, 512).0).collect();
    let outcome = exchange(HeaderStyle::Structured, commands, |requests| {
        let cookie = |i: usize| requests[i].cookie;
        let at = [&28u32.to_be_bytes()[..], &[0, 2], b"no", &[0; 8]].concat();
        [
            structured(0, chunk::OFFSET_DATA, cookie(0), &data(0, &[1; 100])),
            structured(1, chunk::ERROR_OFFSET, cookie(0), &at),
            // Of a type to come, with a number to come.
            structured(1, 0x8123, cookie(1), b"\0\0\x03\xe7\0\0more"),
            simple(1, cookie(2), &[]),
        ]
        .concat()
    });
    let errors = [libc::ENOSPC, libc::EINVAL, libc::EPERM].map(|e| Some(Err(e)));
    assert_eq!(outcome.answers, errors);
    assert_eq!(outcome.broken, None);
}

#[test]
fn a_block_status_is_the_first_extent() {
    let outcome = exchange(
        HeaderStyle::Structured,
        vec![status_command()],
        |requests| {
            let payload = extents(7, &[(u32::MAX, 3), (1, 0)]);
            structured(1, chunk::BLOCK_STATUS, requests[0].cookie, &payload)
        },
    );
    let status = Status {
        len: u32::MAX.into(),
        flags: 3,
    };
    assert_eq!(outcome.answers, [Some(Ok(Some(status)))]);
}

#[test]
fn extended_headers_carry_what_others_cannot() {
    let mut ask = status_command();
    ask.len = 1 << 40;
    let outcome = exchange(HeaderStyle::Extended, vec![ask], |requests| {
        assert_eq!(requests[0].len, 1 << 40);
        let mut payload = [7u32.to_be_bytes(), 1u32.to_be_bytes()].concat();
        payload.extend((1u64 << 40).to_be_bytes());
        payload.extend(3u64.to_be_bytes());
        let mut out = Vec::new();
        ChunkHeader {
            flags: 1,
            kind: chunk::BLOCK_STATUS_EXT,
            cookie: requests[0].cookie,
            offset: 512,
            len: payload.len() as u64,
        }
        .encode_extended(&mut out);
        [out, payload].concat()
    });
    let status = Status {
        len: 1 << 40,
        flags: 3,
    };
    assert_eq!(outcome.answers, [Some(Ok(Some(status)))]);
}

#[test]
fn a_reply_that_breaks_the_rules_ends_the_connection_and_answers_nothing() {
    type Say = fn(u64) -> Vec<u8>;
    let simple_cases: [(Say, &str); 3] = [
        (|c| simple(0, c + 1, &[]), "a reply to no request"),
        (|c| simple(0, c ^ 1 << 40, &[]), "a reply to no request"),
        (|_| vec![0xff; 64], "Bad magic number"),
    ];
    let read_cases: [(Say, &str); 18] = [
        (|c| simple(0, c, &[0; 512]), "a simple reply with data"),
        (
            |c| structured(1, chunk::NONE, c, &[]),
            "a read that is not answered in full",
        ),
        (|c| structured(0, chunk::NONE, c, &[]), "a bad empty chunk"),
        (|c| structured(1, chunk::NONE, c, &[1]), "a bad empty chunk"),
        (
            |c| structured(1, chunk::OFFSET_DATA, c, &data(512, &[])),
            "a data chunk without data",
        ),
        (
            |c| structured(1, chunk::OFFSET_DATA, c, &[0; 3]),
            "a data chunk without data",
        ),
        (
            |c| structured(1, chunk::OFFSET_DATA, c, &data(511, &[1; 512])),
            "data outside the range that was asked for",
        ),
        (
            |c| structured(1, chunk::OFFSET_DATA, c, &data(512, &[1; 513])),
            "data outside the range that was asked for",
        ),
        (
            |c| structured(1, chunk::OFFSET_DATA, c, &data(u64::MAX, &[1; 512])),
            "data outside the range that was asked for",
        ),
        (
            |c| {
                let twice = structured(0, chunk::OFFSET_DATA, c, &data(512, &[1; 300]));
                [twice.clone(), twice].concat()
            },
            "the same bytes of a read twice",
        ),
        (
            |c| {
                // As many bytes as were asked for, and the last ones missing.
                let data = structured(0, chunk::OFFSET_DATA, c, &data(512, &[1; 300]));
                [data, structured(1, chunk::OFFSET_HOLE, c, &hole(600, 212))].concat()
            },
            "the same bytes of a read twice",
        ),
        (
            |c| structured(1, chunk::OFFSET_HOLE, c, &hole(512, u32::MAX)),
            "data outside the range that was asked for",
        ),
        (
            |c| structured(1, chunk::OFFSET_HOLE, c, &hole(512, 0)),
            "data outside the range that was asked for",
        ),
        (
            |c| structured(1, chunk::OFFSET_HOLE, c, &[0; 5]),
            "wrong length",
        ),
        (
            |c| structured(1, chunk::BLOCK_STATUS, c, &extents(7, &[(1, 1)])),
            "a chunk that does not fit the request",
        ),
        (
            |c| structured(1, chunk::ERROR, c, &[0; 6]),
            "an error chunk without error",
        ),
        (
            |c| structured(1, chunk::ERROR, c, b"\0\0\0\x05\xff\xffshort"),
            "wrong length",
        ),
        (
            |c| structured(1, chunk::ERROR, c, &[0; 100_000]),
            "a chunk that is too long",
        ),
    ];
    let status_cases: [(Say, &str); 6] = [
        (
            |c| structured(1, chunk::BLOCK_STATUS, c, &extents(8, &[(512, 0)])),
            "a context that was not asked for",
        ),
        (
            |c| structured(1, chunk::BLOCK_STATUS, c, &extents(7, &[])),
            "wrong length",
        ),
        (
            |c| structured(1, chunk::BLOCK_STATUS, c, &extents(7, &[(0, 0)])),
            "wrong length",
        ),
        (
            |c| {
                let one = structured(0, chunk::BLOCK_STATUS, c, &extents(7, &[(512, 0)]));
                [one.clone(), one].concat()
            },
            "two replies about one context",
        ),
        (
            |c| structured(1, chunk::NONE, c, &[]),
            "a block status without extents",
        ),
        (|c| simple(0, c, &[]), "a simple reply with data"),
    ];
    let cases = simple_cases
        .map(|case| (HeaderStyle::Simple, read_command(512, 512).0, case))
        .into_iter()
        .chain(read_cases.map(|case| (HeaderStyle::Structured, read_command(512, 512).0, case)))
        .chain(status_cases.map(|case| (HeaderStyle::Structured, status_command(), case)));
    for (style, command, (say, why)) in cases {
        let outcome = exchange(
            style,
            vec![command],
            move |requests| say(requests[0].cookie),
        );
        let broken = outcome.broken.unwrap_or_default();
        assert!(broken.contains(why), "'{broken}' should say '{why}'");
        assert_eq!((outcome.answers, outcome.unanswered), (vec![None], 1));
    }
}
