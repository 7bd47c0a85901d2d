//! Exports under clients whose requests the storage holds.

use std::cell::RefCell;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::poll;

use super::*;
use crate::error::IoOp;
use crate::graph::GraphError;
use crate::nbd::protocol::{
    BASE_ALLOCATION, BlockDescriptor, ChunkHeader, ErrorChunk, InfoRequest, MetaContextRequest,
    OptionHeader, OptionReplyHeader, Request, SimpleReplyHeader, chunk, command, command_flag,
    decode_block_status, option, option_reply,
};
use crate::node::{Node, NodeOptions};
use crate::runtime::{EventLoop, unblock};
use crate::test_storage::{Match, TestStorage};
use crate::wait::LocalWaiters;

const SIZE: u64 = 1 << 20;
const LONG: Duration = Duration::from_secs(30);

struct Rig {
    graph: Rc<Graph>,
    exports: Rc<Exports>,
    storage: TestStorage,
    node: Arc<Node>,
    gone: Rc<Gone>,
    folder: tempfile::TempDir,
}

/// Ids of exports that were said to have gone.
#[derive(Default)]
struct Gone {
    ids: RefCell<Vec<String>>,
    changed: LocalWaiters,
}

impl Gone {
    async fn wait(&self, id: &str) {
        let gone = || self.ids.borrow().iter().any(|other| other == id);
        self.changed.until(|| gone().then_some(())).await;
    }
}

/// Runs a test with a node 'disk', a server, and an export 'disk' with the id 'e'.
fn with_export<F: Future<Output = ()>>(test: impl FnOnce(Rig) -> F) {
    let main = EventLoop::new("test").expect("an event loop");
    main.block_on(async {
        let graph = Graph::new();
        let storage = TestStorage::new(SIZE);
        let node = graph
            .add_node(Some("disk"), storage.driver(), NodeOptions::default())
            .expect("a free name");
        let gone = Rc::new(Gone::default());
        let exports = Exports::new(&graph, {
            let gone = Rc::clone(&gone);
            move |id| {
                gone.ids.borrow_mut().push(id.to_owned());
                gone.changed.wake();
            }
        });
        let rig = Rig {
            graph,
            exports,
            storage,
            node,
            gone,
            folder: tempfile::tempdir().expect("a folder"),
        };
        rig.start().await.expect("the server starts");
        rig.add("e").expect("nobody is against it");
        test(rig).await;
    });
}

impl Rig {
    fn path(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    async fn start(&self) -> Result<(), ExportError> {
        let options = NbdServerOptions {
            address: ListenAddress::Unix { path: self.path() },
            max_connections: 10,
        };
        self.exports.start_nbd_server(options).await
    }

    fn add(&self, id: &str) -> Result<(), ExportError> {
        self.exports.add(ExportOptions {
            id: id.to_owned(),
            node_name: "disk".to_owned(),
            writable: true,
            writethrough: false,
            iothread: None,
            kind: ExportKind::Nbd {
                name: None,
                description: None,
                allocation_depth: true,
                bitmaps: Vec::new(),
            },
        })
    }

    async fn client(&self, style: u32) -> Client {
        let path = self.path();
        unblock(move || Client::connect(path, style)).await
    }

    fn shutting_down(&self) -> Vec<bool> {
        let list = self.exports.list();
        list.iter().map(|export| export.shutting_down).collect()
    }
}

/// A client. Blocks: its methods are called by [`Client::run`].
struct Client {
    stream: UnixStream,
}

/// No option for how replies look: simple ones.
const SIMPLE: u32 = 0;

impl Client {
    /// `style`: the option that asks for other replies, or [`SIMPLE`].
    fn connect(path: PathBuf, style: u32) -> Self {
        let stream = UnixStream::connect(path).expect("the server listens");
        stream.set_read_timeout(Some(LONG)).expect("a socket");
        let mut this = Self { stream };
        this.take(18);
        this.send(&3u32.to_be_bytes());
        let export = "disk";
        if style != SIMPLE {
            this.option(style, &[]);
            let mut data = Vec::new();
            let queries = vec![BASE_ALLOCATION];
            MetaContextRequest { export, queries }.encode(&mut data);
            this.option(option::SET_META_CONTEXT, &data);
        }
        let mut data = Vec::new();
        let wanted = Vec::new();
        InfoRequest { export, wanted }.encode(&mut data);
        this.option(option::GO, &data);
        this
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).expect("the server reads");
    }

    fn take(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.stream
            .read_exact(&mut bytes)
            .expect("the server answers");
        bytes
    }

    fn option(&mut self, option: u32, data: &[u8]) {
        let mut out = Vec::new();
        let len = data.len() as u32;
        OptionHeader { option, len }.encode(&mut out);
        out.extend_from_slice(data);
        self.send(&out);
        loop {
            let header = self.take(OptionReplyHeader::LEN);
            let header = OptionReplyHeader::decode(header[..].try_into().unwrap()).unwrap();
            self.take(header.len as usize);
            assert!(!header.is_error(), "{header:?}");
            if header.reply == option_reply::ACK {
                return;
            }
        }
    }

    /// Header and number of a simple reply.
    fn simple(&mut self) -> (u64, u32) {
        let bytes = self.take(SimpleReplyHeader::LEN);
        let header = SimpleReplyHeader::decode(bytes[..].try_into().unwrap()).unwrap();
        (header.cookie, header.error)
    }

    /// Lets the client do something on a thread that may block.
    async fn run<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Client) -> R + Send + 'static,
    ) -> R {
        let stream = self.stream.try_clone().expect("a descriptor");
        unblock(move || work(&mut Client { stream })).await
    }
}

fn request(command: u16, cookie: u64, offset: u64, len: u64) -> Request {
    Request {
        flags: 0,
        command,
        cookie,
        offset,
        len,
    }
}

/// Requests as they are sent; a write is of its cookie's byte.
fn compact(requests: &[Request]) -> Vec<u8> {
    let mut out = Vec::new();
    for request in requests {
        request.encode_compact(&mut out);
        if request.command == command::WRITE {
            out.resize(out.len() + request.len as usize, request.cookie as u8);
        }
    }
    out
}

#[test]
fn a_section_waits_for_requests_that_were_accepted_and_holds_the_next() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.hold(Match::op(IoOp::Write));
        let first = compact(&[request(command::WRITE, 1, 0, 512)]);
        client.run(move |client| client.send(&first)).await;
        rig.storage.wait_held(1).await;
        let mut section = pin!(rig.graph.drain(&rig.node, &[]));
        // It has begun.
        assert!(poll!(section.as_mut()).is_pending());
        let second = compact(&[request(command::WRITE, 2, 512, 512)]);
        client.run(move |client| client.send(&second)).await;
        assert!(poll!(section.as_mut()).is_pending());
        rig.storage.release_all();
        let drained = section.await.expect("the request has ended");
        // The first is answered although the section goes on; the second waits.
        assert_eq!(client.run(Client::simple).await, (1, 0));
        assert_eq!((rig.storage.in_flight(), rig.storage.ended().len()), (0, 1));
        drop(drained);
        assert_eq!(client.run(Client::simple).await, (2, 0));
        assert_eq!(rig.storage.peek(0, 1024)[511..513], [1, 2]);
    });
}

#[test]
fn a_client_that_stops_in_the_midst_of_a_request_holds_up_no_section() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        // The flush is answered, so the part behind it has arrived too.
        let mut out = compact(&[
            request(command::FLUSH, 1, 0, 0),
            request(command::WRITE, 2, 0, 4096),
        ]);
        let rest = out.split_off(out.len() - 1000);
        client.run(move |client| client.send(&out)).await;
        assert_eq!(client.run(Client::simple).await, (1, 0));
        let drained = rig.graph.drain(&rig.node, &[]).await;
        drop(drained.expect("no request is in flight"));
        client.run(move |client| client.send(&rest)).await;
        assert_eq!(client.run(Client::simple).await, (2, 0));
        assert_eq!(rig.storage.peek(4095, 2), [2, 0]);
    });
}

#[test]
fn replies_come_when_they_are_ready() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.hold(Match::op(IoOp::Write).range(0..512));
        let out = compact(&[
            request(command::WRITE, 1, 0, 512),
            request(command::WRITE, 2, 4096, 512),
        ]);
        client.run(move |client| client.send(&out)).await;
        assert_eq!(client.run(Client::simple).await, (2, 0));
        rig.storage.release_all();
        assert_eq!(client.run(Client::simple).await, (1, 0));
    });
}

#[test]
fn a_client_that_has_just_left_stands_against_no_safe_deletion() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        drop(client);
        rig.exports
            .delete("e", DeleteMode::Safe)
            .await
            .expect("its client has left");
    });
}

#[test]
fn a_deletion_that_cuts_clients_off_returns_before_it_is_done() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        let deleted = rig.exports.delete("e", DeleteMode::Hard).await;
        deleted.expect("it is there");
        assert_eq!(rig.shutting_down(), [true]);
        rig.gone.wait("e").await;
        let end = client.run(|client| client.stream.read(&mut [0])).await;
        assert_eq!(end.expect("an orderly end"), 0);
    });
}

#[test]
fn an_export_is_gone_when_its_last_request_has_ended() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.hold(Match::op(IoOp::Write));
        let out = compact(&[request(command::WRITE, 1, 0, 512)]);
        client.run(move |client| client.send(&out)).await;
        rig.storage.wait_held(1).await;
        let safe = rig.exports.delete("e", DeleteMode::Safe).await;
        assert!(matches!(safe, Err(ExportError::InUse { .. })), "{safe:?}");
        rig.exports
            .delete("e", DeleteMode::Hard)
            .await
            .expect("it is there");
        assert_eq!(rig.shutting_down(), [true]);
        let again = rig.add("e");
        assert!(
            matches!(again, Err(ExportError::IdInUse { .. })),
            "{again:?}"
        );
        let twice = rig.exports.delete("e", DeleteMode::Hard).await;
        let shutting_down = matches!(twice, Err(ExportError::ShuttingDown { .. }));
        assert!(shutting_down, "{twice:?}");
        let used = rig.graph.blockdev_del("disk").await;
        assert!(matches!(used, Err(GraphError::NodeInUse(_))), "{used:?}");
        // The client is cut off at once, all the same.
        let end = client.run(|client| client.stream.read(&mut [0])).await;
        assert_eq!(end.expect("an orderly end"), 0);
        rig.storage.release_all();
        rig.gone.wait("e").await;
        assert!(rig.exports.list().is_empty());
        rig.add("e").expect("the id is free");
        assert_eq!(rig.storage.peek(0, 1), [1], "what was accepted is done");
    });
}

#[test]
fn a_drained_section_comes_in_between_the_pieces_of_long_zeroes() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.poke(0, &[1; SIZE as usize]);
        rig.storage.hold(Match::op(IoOp::WriteZeroes).range(0..1));
        let out = compact(&[request(command::WRITE_ZEROES, 1, 0, SIZE)]);
        client.run(move |client| client.send(&out)).await;
        rig.storage.wait_held(1).await;
        let mut section = pin!(rig.graph.drain(&rig.node, &[]));
        assert!(poll!(section.as_mut()).is_pending());
        rig.storage.release_all();
        let drained = section.await.expect("the piece has ended");
        let left = rig.storage.peek(0, SIZE as usize);
        assert_eq!((left[0], left[SIZE as usize - 1]), (0, 1));
        drop(drained);
        assert_eq!(client.run(Client::simple).await, (1, 0));
        assert!(rig.storage.snapshot().iter().all(|byte| *byte == 0));
    });
}

#[test]
fn long_zeroes_end_with_their_client() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.poke(0, &[1; SIZE as usize]);
        rig.storage.hold(Match::op(IoOp::WriteZeroes).range(0..1));
        let out = compact(&[request(command::WRITE_ZEROES, 1, 0, SIZE)]);
        client.run(move |client| client.send(&out)).await;
        rig.storage.wait_held(1).await;
        rig.exports
            .delete("e", DeleteMode::Hard)
            .await
            .expect("it is there");
        rig.storage.release_all();
        rig.gone.wait("e").await;
        let left = rig.storage.peek(0, SIZE as usize);
        assert_eq!((left[0], left[SIZE as usize - 1]), (0, 1));
    });
}

#[test]
fn a_stop_waits_for_requests_no_longer_than_it_was_told() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.hold(Match::op(IoOp::Write));
        let out = compact(&[request(command::WRITE, 1, 0, 512)]);
        client.run(move |client| client.send(&out)).await;
        rig.storage.wait_held(1).await;
        let left = rig.exports.stop_nbd_server(Duration::from_millis(1)).await;
        assert_eq!(left.expect("it runs"), ["e"]);
        let stopped = rig.exports.stop_nbd_server(LONG).await;
        assert!(matches!(stopped, Err(ExportError::ServerNotRunning)));
        // The address is free, while the export still goes.
        rig.start().await.expect("the server starts again");
        rig.add("e2").expect("the name is free");
        assert_eq!(rig.shutting_down(), [false, true]);
        assert_eq!(rig.exports.close_all(Duration::from_millis(1)).await, ["e"]);
        rig.storage.release_all();
        rig.gone.wait("e").await;
        assert_eq!(*rig.gone.ids.borrow(), ["e2", "e"]);
    });
}

#[test]
fn a_write_of_part_of_a_sector_loses_nothing_of_a_write_beside_it() {
    with_export(|rig| async move {
        let client = rig.client(SIMPLE).await;
        rig.storage.hold(Match::op(IoOp::Write));
        // The flush is answered when the write of a part was begun.
        let out = compact(&[
            request(command::WRITE, 1, 0, 512),
            request(command::WRITE, 2, 10, 10),
            request(command::FLUSH, 3, 0, 0),
        ]);
        client.run(move |client| client.send(&out)).await;
        assert_eq!(client.run(Client::simple).await, (3, 0));
        rig.storage.wait_held(1).await;
        // Had it read the sector by now, it would write what was before back.
        assert_eq!(rig.storage.held_requests(), [(IoOp::Write, 0)]);
        rig.storage.release_all();
        let mut replies = [
            client.run(Client::simple).await,
            client.run(Client::simple).await,
        ];
        replies.sort_unstable();
        assert_eq!(replies, [(1, 0), (2, 0)]);
        let sector = rig.storage.peek(0, 513);
        let expected = [vec![1; 10], vec![2; 10], vec![1; 492], vec![0]].concat();
        assert_eq!(sector, expected);
    });
}

#[test]
fn errors_of_the_storage_reach_the_client() {
    with_export(|rig| async move {
        let client = rig.client(option::STRUCTURED_REPLY).await;
        rig.storage.fail_once(Match::op(IoOp::Write), libc::ENOSPC);
        rig.storage.fail_once(Match::op(IoOp::Read), libc::EIO);
        for (command, error) in [(command::WRITE, 28), (command::READ, 5)] {
            let out = compact(&[request(command, 1, 0, 512)]);
            let found = client.run(move |client| {
                client.send(&out);
                let header = client.take(ChunkHeader::STRUCTURED_LEN);
                let header = ChunkHeader::decode_structured(header[..].try_into().unwrap());
                let header = header.unwrap();
                assert!(header.is_done() && header.is_error());
                let payload = client.take(header.len as usize);
                ErrorChunk::decode(header.kind, &payload).unwrap().error
            });
            assert_eq!(found.await, error);
        }
    });
}

#[test]
fn extended_headers_carry_holes_data_and_status() {
    with_export(|rig| async move {
        let client = rig.client(option::EXTENDED_HEADERS).await;
        rig.storage.poke(0, &[7; 4096]);
        let kinds = client.run(|client| {
            let mut ask = |request: Request, payload: &[u8]| {
                let mut out = Vec::new();
                request.encode_extended(&mut out);
                out.extend_from_slice(payload);
                client.send(&out);
                let mut chunks = Vec::new();
                loop {
                    let header = client.take(ChunkHeader::EXTENDED_LEN);
                    let header = ChunkHeader::decode_extended(header[..].try_into().unwrap());
                    let header = header.unwrap();
                    assert_eq!(
                        (header.cookie, header.offset),
                        (request.cookie, request.offset)
                    );
                    chunks.push((header.kind, client.take(header.len as usize)));
                    if header.is_done() {
                        return chunks;
                    }
                }
            };
            let write = Request {
                flags: command_flag::PAYLOAD_LEN,
                ..request(command::WRITE, 1, 4096, 512)
            };
            assert_eq!(ask(write, &[9; 512]), [(chunk::NONE, vec![])]);
            let status = ask(request(command::BLOCK_STATUS, 2, 0, SIZE), &[]);
            assert_eq!(status[0].0, chunk::BLOCK_STATUS_EXT);
            let (_, extents) = decode_block_status(true, &status[0].1).unwrap();
            let total: u64 = extents.iter().map(|extent| extent.len).sum();
            assert_eq!(total, SIZE);
            assert_eq!(extents[0].status, 0);
            let hole = BlockDescriptor {
                len: total - extents[0].len,
                status: 3,
            };
            assert_eq!(extents[1..], [hole]);
            let read = ask(request(command::READ, 3, 0, SIZE), &[]);
            let beyond = Request {
                flags: 0,
                ..request(command::TRIM, 4, 0, 1 << 40)
            };
            assert_eq!(ask(beyond, &[])[0].0, chunk::ERROR);
            read.iter().map(|(kind, _)| *kind).collect::<Vec<_>>()
        });
        assert_eq!(kinds.await, [chunk::OFFSET_DATA, chunk::OFFSET_HOLE]);
        assert_eq!(rig.storage.peek(4096, 1), [9]);
    });
}
