//! What servers may say before an export is agreed on.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::super::error::NbdError;
use super::super::handshake::{Export, HeaderStyle, negotiate};
use super::with_server;
use crate::nbd::protocol::{option, option_reply as answer, transmission_flag};

fn reply(option: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut out = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&reply.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

fn export_info(size: u64, flags: u16) -> Vec<u8> {
    let mut data = vec![0, 0];
    data.extend_from_slice(&size.to_be_bytes());
    data.extend_from_slice(&flags.to_be_bytes());
    reply(option::GO, answer::INFO, &data)
}

fn block_sizes(minimum: u32, preferred: u32, maximum: u32) -> Vec<u8> {
    let mut data = vec![0, 3];
    for size in [minimum, preferred, maximum] {
        data.extend_from_slice(&size.to_be_bytes());
    }
    reply(option::GO, answer::INFO, &data)
}

fn go_ack() -> Vec<u8> {
    reply(option::GO, answer::ACK, &[])
}

/// The greeting of fixed newstyle.
fn greeting() -> Vec<u8> {
    b"NBDMAGICIHAVEOPT\0\x03".to_vec()
}

/// A server that refuses all but GO, which it answers with `go`.
fn plain(go: &[Vec<u8>]) -> Vec<u8> {
    let mut script = greeting();
    script.extend(reply(option::EXTENDED_HEADERS, answer::ERR_UNSUP, b"no"));
    script.extend(reply(option::STRUCTURED_REPLY, answer::ERR_UNSUP, &[]));
    script.extend(go.concat());
    script
}

/// What comes of a server that says all this, whatever it hears, and hangs up.
fn meet(script: Vec<u8>) -> Result<Export, NbdError> {
    meet_as(script, "disk")
}

fn meet_as(script: Vec<u8>, export: &'static str) -> Result<Export, NbdError> {
    with_server(
        move |mut stream: UnixStream| {
            // A client that has seen enough hangs up first.
            let _ = stream.write_all(&script);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        },
        |socket| async move { negotiate(&socket, export, None).await },
    )
}

fn refusal(script: Vec<u8>) -> String {
    meet(script).unwrap_err().to_string()
}

#[test]
fn a_plain_server_is_understood() {
    let export = meet(plain(&[export_info(1 << 20, 5), go_ack()])).unwrap();
    assert_eq!((export.size, export.flags), (1 << 20, 5));
    assert_eq!((export.min_block, export.max_payload), (1, 32 << 20));
    assert_eq!(export.style, HeaderStyle::Simple);
    assert!(!export.has_status());
}

#[test]
fn all_that_a_server_offers_is_taken() {
    let mut script = greeting();
    script.extend(reply(option::EXTENDED_HEADERS, answer::ACK, &[]));
    let context = [&[0, 0, 0, 9][..], b"base:allocation"].concat();
    let set = option::SET_META_CONTEXT;
    script.extend(reply(set, answer::META_CONTEXT, &context));
    script.extend(reply(set, answer::ACK, &[]));
    script.extend(block_sizes(4096, 8192, 70_000));
    // A description that nobody asked for.
    script.extend(reply(option::GO, answer::INFO, b"\0\x02a disk"));
    script.extend(export_info(8192, 1));
    script.extend(go_ack());
    let export = meet(script).unwrap();
    assert_eq!(export.style, HeaderStyle::Extended);
    assert_eq!(export.context, Some(9));
    // A whole number of blocks.
    assert_eq!((export.min_block, export.max_payload), (4096, 69_632));
}

#[test]
fn a_server_without_go_is_asked_by_name() {
    let mut script = plain(&[reply(option::GO, answer::ERR_UNSUP, &[])]);
    script.extend_from_slice(&(1u64 << 20).to_be_bytes());
    script.extend_from_slice(&1u16.to_be_bytes());
    assert_eq!(meet(script).unwrap().size, 1 << 20);
}

#[test]
fn a_server_of_the_first_kind_has_one_export_without_a_name() {
    let mut script = b"NBDMAGIC\0\0\x42\x02\x81\x86\x12\x53".to_vec();
    script.extend_from_slice(&(1u64 << 20).to_be_bytes());
    script.extend_from_slice(&3u32.to_be_bytes());
    script.extend_from_slice(&[0; 124]);
    let export = meet_as(script.clone(), "").unwrap();
    assert!(export.can(transmission_flag::READ_ONLY));
    assert_eq!(
        refusal(script),
        "Server does not support non-empty export names"
    );
}

#[test]
fn greetings_that_are_none_are_named() {
    const EOF: &str = "Unexpected end-of-file before all data were read";
    let cases = [
        (&b""[..], format!("Failed to read initial magic: {EOF}")),
        (b"NBDM", format!("Failed to read initial magic: {EOF}")),
        (
            b"HTTP/1.1 400 Bad request",
            "Bad initial magic received: 0x485454502f312e31".into(),
        ),
        (
            b"NBDMAGIC\0\0\0\0\0\0\0\x07",
            "Bad server magic received: 0x7".into(),
        ),
        (
            b"NBDMAGICIHAVEOPT",
            format!("Failed to read server flags: {EOF}"),
        ),
        (
            b"NBDMAGICIHAVEOPT\0\x03",
            format!("Failed to read option reply: {EOF}"),
        ),
    ];
    for (script, text) in cases {
        assert_eq!(refusal(script.to_vec()), text);
    }
}

#[test]
fn refusals_of_the_export_are_told_in_qemus_words() {
    let cases = [
        (answer::ERR_POLICY, "Denied by server for option 7 (go)"),
        (answer::ERR_INVALID, "Invalid parameters for option 7 (go)"),
        (
            answer::ERR_TLS_REQD,
            "TLS negotiation required before option 7 (go)",
        ),
        (answer::ERR_UNKNOWN, "Requested export not available"),
        (
            answer::ERR_SHUTDOWN,
            "Server shutting down before option 7 (go)",
        ),
        (
            1 << 31 | 99,
            "Unknown error code when asking for option 7 (go)",
        ),
    ];
    for (code, text) in cases {
        let script = plain(&[reply(option::GO, code, b"because")]);
        assert_eq!(refusal(script), text);
    }
}

#[test]
fn replies_that_make_no_sense_end_the_handshake() {
    let go = |code, data: &[u8]| plain(&[reply(option::GO, code, data)]);
    let mut struct_list = greeting();
    struct_list.extend(reply(option::EXTENDED_HEADERS, answer::SERVER, &[]));
    let mut struct_ack = greeting();
    struct_ack.extend(reply(option::EXTENDED_HEADERS, answer::ACK, b"x"));
    let mut rubbish = greeting();
    rubbish.extend([0xff; 64]);
    let cases = [
        (go(answer::ACK, b"abc"), "server sent invalid NBD_REP_ACK"),
        (
            go(answer::ACK, b""),
            "broken server omitted NBD_INFO_EXPORT",
        ),
        (
            go(77, b""),
            "unexpected reply type 77 (<unknown>), expected 3 (info)",
        ),
        (go(answer::INFO, b"a"), "NBD_REP_INFO length 1 is too short"),
        (
            go(answer::INFO, b"\0\0abc"),
            "remaining export info len 3 is unexpected size",
        ),
        (
            plain(&[reply(99, answer::ACK, b"")]),
            "Unexpected option type 99 (<unknown>), expected 7 (go)",
        ),
        (rubbish, "Unexpected option reply magic"),
        (
            struct_list,
            "Server answered option 11 (extended headers) with unexpected reply 2 (server)",
        ),
        (struct_ack, "server sent invalid NBD_REP_ACK"),
    ];
    for (script, text) in cases {
        assert_eq!(refusal(script), text);
    }
}

#[test]
fn sizes_and_blocks_that_cannot_be_are_refused() {
    let sized = |size, blocks: [u32; 3]| {
        plain(&[
            export_info(size, 1),
            block_sizes(blocks[0], blocks[1], blocks[2]),
            go_ack(),
        ])
    };
    const MIB: u32 = 1 << 20;
    let cases = [
        (
            sized(4096, [0, 1, MIB]),
            "server minimum block size 0 is not a power of two",
        ),
        (
            sized(4096, [3, 4, MIB]),
            "server minimum block size 3 is not a power of two",
        ),
        (
            sized(1 << 20, [MIB, MIB, MIB]),
            "server minimum block size 1048576 is larger than 65536",
        ),
        (
            sized(4096, [4096, 512, MIB]),
            "server preferred block size 512 is not valid",
        ),
        (
            sized(4096, [4096, 4096, 100]),
            "server maximum block size 100 is not valid",
        ),
        (
            sized(4608, [4096, 4096, MIB]),
            "export length 4608 is not multiple of minimum block size 4096",
        ),
        (
            sized(1000, [512, 4096, MIB]),
            "export length 1000 is not multiple of minimum block size 512",
        ),
        (
            sized(u64::MAX, [1, 1, MIB]),
            "Could not refresh total sector count: File too large",
        ),
        (
            plain(&[export_info(4096, 0), go_ack()]),
            "broken server omitted NBD_INFO_EXPORT",
        ),
    ];
    for (script, text) in cases {
        assert_eq!(refusal(script), text);
    }
}

#[test]
fn no_memory_is_taken_at_the_servers_word() {
    let mut long_info = plain(&[]);
    long_info.extend(&reply(option::GO, answer::INFO, &[])[..16]);
    long_info.extend(u32::MAX.to_be_bytes());
    assert_eq!(
        refusal(long_info),
        "Server's reply to option 7 (go) has 4294967295 bytes, too many"
    );
    let mut long_error = greeting();
    long_error.extend(&reply(option::EXTENDED_HEADERS, answer::ERR_UNSUP, &[])[..16]);
    long_error.extend(u32::MAX.to_be_bytes());
    assert_eq!(
        refusal(long_error),
        "Server's reply to option 11 (extended headers) has 4294967295 bytes, too many"
    );
}

#[test]
fn a_server_that_never_comes_to_the_point_is_left() {
    let chatter = vec![reply(option::GO, answer::INFO, b"\0\x02word"); 100];
    assert_eq!(
        refusal(plain(&chatter)),
        "Server sent too many replies to option 7 (go)"
    );
}

#[test]
fn an_export_that_has_changed_cannot_stand_for_the_old_one() {
    let offer = |size, flags, blocks: u32| {
        meet(plain(&[
            export_info(size, flags),
            block_sizes(blocks, blocks, 1 << 20),
            go_ack(),
        ]))
        .unwrap()
    };
    let before = offer(1 << 20, 5, 512);
    let check = |again| before.check_still_there(&again).map_err(|e| e.to_string());
    assert_eq!(check(offer(1 << 20, 0xd, 1)), Ok(()));
    let changed = |what| {
        Err(format!(
            "The export has changed since it was opened: {what}"
        ))
    };
    assert_eq!(
        check(offer(2 << 20, 5, 512)),
        changed("its size is another")
    );
    assert_eq!(
        check(offer(1 << 20, 7, 512)),
        changed("it can only be read")
    );
    assert_eq!(check(offer(1 << 20, 1, 512)), changed("it can do less"));
    assert_eq!(
        check(offer(1 << 20, 5, 4096)),
        changed("its block sizes are others")
    );
}

#[test]
fn a_server_that_comes_back_without_extended_headers_is_not_used() {
    let offer = |extended| {
        let mut script = greeting();
        if extended {
            script.extend(reply(option::EXTENDED_HEADERS, answer::ACK, &[]));
        } else {
            script.extend(reply(option::EXTENDED_HEADERS, answer::ERR_UNSUP, &[]));
            script.extend(reply(option::STRUCTURED_REPLY, answer::ACK, &[]));
        }
        script.extend(reply(option::SET_META_CONTEXT, answer::ERR_UNSUP, &[]));
        script.extend(export_info(1 << 20, 5));
        script.extend(go_ack());
        meet(script).unwrap()
    };
    // Requests of more than 4 GiB would not be what they were meant to be.
    let changed = offer(true).check_still_there(&offer(false)).unwrap_err();
    assert_eq!(
        changed.to_string(),
        "The export has changed since it was opened: it takes shorter requests"
    );
    assert!(offer(false).check_still_there(&offer(true)).is_ok());
}
