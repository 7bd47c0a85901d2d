//! What is encoded is decoded to the same; bytes of a hostile peer are refused.

use proptest::prelude::*;

use super::*;

#[test]
fn headers_are_laid_out_as_the_specification_says() {
    let mut out = Vec::new();
    let request = Request {
        flags: command_flag::FUA,
        command: command::WRITE,
        cookie: 0x0102_0304_0506_0708,
        offset: 0x1000,
        len: 512,
    };
    request.encode_compact(&mut out);
    assert_eq!(
        out,
        [
            0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0x10, 0,
            0, 0, 2, 0
        ]
    );
    assert_eq!(
        Request::decode_compact(out[..].try_into().unwrap()),
        Ok(request)
    );
    out.clear();
    OptionHeader {
        option: option::GO,
        len: 6,
    }
    .encode(&mut out);
    assert_eq!(out, *b"IHAVEOPT\0\0\0\x07\0\0\0\x06");
    assert_eq!(INIT_MAGIC.to_be_bytes(), *b"NBDMAGIC");
}

#[test]
fn a_wrong_magic_number_is_named() {
    let mut out = Vec::new();
    SimpleReplyHeader {
        error: 0,
        cookie: 1,
    }
    .encode(&mut out);
    out[0] ^= 1;
    let error = SimpleReplyHeader::decode(out[..].try_into().unwrap()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "Bad magic number 0x66446698 in the NBD simple reply"
    );
}

#[test]
fn a_query_count_without_queries_is_refused_without_memory_for_them() {
    let mut data = Vec::new();
    MetaContextRequest {
        export: "x",
        queries: vec![],
    }
    .encode(&mut data);
    let count = data.len() - 4;
    data[count..].copy_from_slice(&u32::MAX.to_be_bytes());
    assert_eq!(
        MetaContextRequest::decode(&data),
        Err(ProtocolError::Length {
            what: "META_CONTEXT option"
        })
    );
}

#[test]
fn strings_are_bounded_and_text() {
    let long = "x".repeat(MAX_STRING + 1);
    let mut data = Vec::new();
    InfoRequest {
        export: &long,
        wanted: vec![],
    }
    .encode(&mut data);
    let text = Err(ProtocolError::Text {
        what: "INFO option",
    });
    assert_eq!(InfoRequest::decode(&data), text);
    assert_eq!(InfoRequest::decode(b"\0\0\0\x01\xff\0\0"), text);
}

#[test]
fn block_status_of_no_extent_or_an_empty_one_is_refused() {
    let mut payload = Vec::new();
    encode_block_status(false, 1, &[], &mut payload);
    assert!(decode_block_status(false, &payload).is_err());
    let empty = BlockDescriptor { len: 0, status: 0 };
    for extended in [false, true] {
        payload.clear();
        encode_block_status(extended, 1, &[empty], &mut payload);
        assert!(decode_block_status(extended, &payload).is_err());
    }
    payload[7] = 2;
    assert!(decode_block_status(true, &payload).is_err(), "wrong count");
}

#[test]
fn a_long_error_message_is_cut_at_a_character() {
    let mut payload = Vec::new();
    encode_error_chunk(22, &"ä".repeat(MAX_STRING), &mut payload);
    let error = ErrorChunk::decode(chunk::ERROR, &payload).unwrap();
    assert_eq!(error.message.len(), MAX_STRING);
    assert_eq!(error.error, 22);
}

#[test]
fn errors_survive_the_wire_and_unknown_ones_are_einval() {
    for errno in [
        libc::EPERM,
        libc::EIO,
        libc::ENOMEM,
        libc::EINVAL,
        libc::ENOSPC,
        libc::EOVERFLOW,
        libc::EOPNOTSUPP,
        libc::ESHUTDOWN,
    ] {
        assert_eq!(errno_from_wire(errno_to_wire(errno)), errno);
    }
    assert_eq!(errno_from_wire(errno_to_wire(libc::ELOOP)), libc::EINVAL);
    assert_eq!(errno_from_wire(4711), libc::EINVAL);
    assert_eq!(errno_from_wire(0), 0);
}

fn any_text() -> impl Strategy<Value = String> {
    "[a-z:äß0-9]{0,40}"
}

proptest! {
    #[test]
    fn requests_and_chunks_come_back_as_sent(
        flags: u16, command: u16, cookie: u64, offset: u64, len: u64, short: u32,
    ) {
        let mut out = Vec::new();
        let request = Request { flags, command, cookie, offset, len };
        request.encode_extended(&mut out);
        prop_assert_eq!(Request::decode_extended(out[..].try_into().unwrap()), Ok(request));
        out.clear();
        let request = Request { len: short.into(), ..request };
        request.encode_compact(&mut out);
        prop_assert_eq!(Request::decode_compact(out[..].try_into().unwrap()), Ok(request));
        out.clear();
        let header = ChunkHeader { flags, kind: command, cookie, offset, len };
        header.encode_extended(&mut out);
        prop_assert_eq!(ChunkHeader::decode_extended(out[..].try_into().unwrap()), Ok(header));
        out.clear();
        let header = ChunkHeader { offset: 0, len: short.into(), ..header };
        header.encode_structured(&mut out);
        prop_assert_eq!(ChunkHeader::decode_structured(out[..].try_into().unwrap()), Ok(header));
    }

    #[test]
    fn options_come_back_as_sent(
        export in any_text(),
        queries in prop::collection::vec(any_text(), 0..5),
        wanted in prop::collection::vec(any::<u16>(), 0..5),
    ) {
        let mut out = Vec::new();
        let queries: Vec<&str> = queries.iter().map(String::as_str).collect();
        let request = MetaContextRequest { export: &export, queries };
        request.encode(&mut out);
        prop_assert_eq!(MetaContextRequest::decode(&out), Ok(request));
        out.clear();
        let request = InfoRequest { export: &export, wanted };
        request.encode(&mut out);
        prop_assert_eq!(InfoRequest::decode(&out), Ok(request));
    }

    #[test]
    fn rubbish_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..100), kind: u16) {
        let _ = MetaContextRequest::decode(&bytes);
        let _ = InfoRequest::decode(&bytes);
        let _ = ExportInfo::decode(&bytes);
        let _ = BlockSizes::decode(&bytes);
        let _ = decode_meta_context(&bytes);
        let _ = ErrorChunk::decode(kind, &bytes);
        let _ = decode_offset_hole(&bytes);
        let _ = decode_block_status(false, &bytes);
        let _ = decode_block_status(true, &bytes);
    }
}
