//! An NBD server in memory for tests: it offers what it is told to, remembers what
//! it was asked, can hold its answers, and can go and come back.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use crate::nbd::protocol::{
    BlockDescriptor, BlockSizes, ChunkHeader, ExportInfo, INIT_MAGIC, OPTION_MAGIC, OptionHeader,
    OptionReplyHeader, Request, SimpleReplyHeader, chunk, chunk_flag, command, encode_block_status,
    encode_meta_context, errno_to_wire, info, option, option_reply, transmission_flag as can,
};
use crate::options::{NbdOptions, SocketAddress};

/// What a server says of itself.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) size: usize,
    pub(crate) flags: u16,
    /// Minimum block size and largest payload; nothing is said of them if `None`.
    pub(crate) blocks: Option<(u32, u32)>,
    pub(crate) structured: bool,
    pub(crate) extended: bool,
    pub(crate) allocation: bool,
    /// Name of its context.
    pub(crate) context: &'static str,
}

impl Default for Offer {
    fn default() -> Self {
        Self {
            size: 1 << 20,
            flags: can::HAS_FLAGS
                | can::SEND_FLUSH
                | can::SEND_FUA
                | can::SEND_TRIM
                | can::SEND_WRITE_ZEROES,
            blocks: None,
            structured: true,
            extended: false,
            allocation: true,
            context: "base:allocation",
        }
    }
}

/// A server at a socket of its own. Dropping it ends it.
pub(crate) struct TestServer {
    path: PathBuf,
    shared: Arc<Shared>,
    _folder: tempfile::TempDir,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    offer: Offer,
    disk: Vec<u8>,
    /// What was asked: command, flags, offset, length.
    log: Vec<(u16, u16, u64, u64)>,
    /// Whether answers are held back.
    holding: bool,
    /// Whether each request ends its connection.
    hangs_up: bool,
    /// Requests whose answers are held back.
    held: usize,
    connections: Vec<UnixStream>,
    /// Connections that have been made, ever.
    accepted: usize,
    listening: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl TestServer {
    pub(crate) fn new(offer: Offer) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let this = Self {
            path: folder.path().join("nbd.sock"),
            shared: Arc::new(Shared {
                state: Mutex::new(State {
                    offer,
                    disk: vec![0; offer.size],
                    log: Vec::new(),
                    holding: false,
                    hangs_up: false,
                    held: 0,
                    connections: Vec::new(),
                    accepted: 0,
                    listening: false,
                }),
                changed: Condvar::new(),
            }),
            _folder: folder,
        };
        this.start();
        this
    }

    /// Options of a node on it.
    pub(crate) fn options(&self) -> NbdOptions {
        NbdOptions {
            server: SocketAddress::Unix {
                path: self.path.clone(),
                is_abstract: false,
                tight: true,
            },
            export: "disk".to_owned(),
            dirty_bitmap: None,
            reconnect_delay: std::time::Duration::ZERO,
            open_timeout: std::time::Duration::ZERO,
        }
    }

    /// Listens (again).
    pub(crate) fn start(&self) {
        let listener = UnixListener::bind(&self.path).unwrap();
        lock(&self.shared.state).listening = true;
        let shared = Arc::clone(&self.shared);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let Ok(stream) = stream else { break };
                let mut state = lock(&shared.state);
                if !state.listening {
                    break;
                }
                state.accepted += 1;
                state.connections.push(stream.try_clone().unwrap());
                drop(state);
                shared.changed.notify_all();
                let shared = Arc::clone(&shared);
                thread::spawn(move || serve(&shared, stream));
            }
        });
    }

    /// Listens no longer and cuts all connections.
    pub(crate) fn stop(&self) {
        let mut state = lock(&self.shared.state);
        if !std::mem::take(&mut state.listening) {
            return;
        }
        drop(state);
        // Wakes the listening thread.
        drop(UnixStream::connect(&self.path));
        std::fs::remove_file(&self.path).unwrap();
        self.cut();
    }

    /// Cuts all connections.
    pub(crate) fn cut(&self) {
        let mut state = lock(&self.shared.state);
        for stream in state.connections.drain(..) {
            // It may have gone already.
            let _ = stream.shutdown(Shutdown::Both);
        }
        state.held = 0;
    }

    /// What later connections are told.
    pub(crate) fn offer(&self, change: impl FnOnce(&mut Offer)) {
        change(&mut lock(&self.shared.state).offer);
    }

    /// Holds answers back, or no longer.
    pub(crate) fn hold(&self, holding: bool) {
        lock(&self.shared.state).holding = holding;
        self.shared.changed.notify_all();
    }

    /// Ends each connection at its first request, or no longer.
    pub(crate) fn hang_up(&self, hangs_up: bool) {
        lock(&self.shared.state).hangs_up = hangs_up;
    }

    /// Connections that have been made, ever.
    pub(crate) fn accepted(&self) -> usize {
        lock(&self.shared.state).accepted
    }

    /// Waits until the answers to `count` requests are held back.
    pub(crate) fn wait_held(&self, count: usize) {
        let state = lock(&self.shared.state);
        let waited = self.shared.changed.wait_while(state, |s| s.held < count);
        drop(waited.unwrap());
    }

    /// Waits until `count` connections have been made, ever.
    pub(crate) fn wait_accepted(&self, count: usize) {
        let state = lock(&self.shared.state);
        let waited = self
            .shared
            .changed
            .wait_while(state, |s| s.accepted < count);
        drop(waited.unwrap());
    }

    /// Waits until `matches` is true of what it was asked.
    pub(crate) fn wait_log(&self, matches: impl Fn(&[(u16, u16, u64, u64)]) -> bool) {
        let state = lock(&self.shared.state);
        let waited = self.shared.changed.wait_while(state, |s| !matches(&s.log));
        drop(waited.unwrap());
    }

    /// What it was asked so far, and forgets it: command, flags, offset, length.
    pub(crate) fn take_log(&self) -> Vec<(u16, u16, u64, u64)> {
        std::mem::take(&mut lock(&self.shared.state).log)
    }

    /// Works on its disk.
    pub(crate) fn disk<R>(&self, work: impl FnOnce(&mut Vec<u8>) -> R) -> R {
        work(&mut lock(&self.shared.state).disk)
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.hold(false);
        self.stop();
    }
}

fn serve(shared: &Shared, mut stream: UnixStream) {
    let offer = lock(&shared.state).offer;
    // An error is the client's or the test's end of the connection.
    if let Ok(agreed) = greet(&offer, &mut stream) {
        let _ = transmit(shared, &offer, agreed, &mut stream);
    }
    let _ = stream.shutdown(Shutdown::Both);
}

/// What a client has chosen.
#[derive(Clone, Copy, Default)]
struct Agreed {
    structured: bool,
    extended: bool,
}

fn read<const N: usize>(stream: &mut UnixStream) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn greet(offer: &Offer, stream: &mut UnixStream) -> io::Result<Agreed> {
    let mut hello = INIT_MAGIC.to_be_bytes().to_vec();
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&3u16.to_be_bytes());
    stream.write_all(&hello)?;
    read::<4>(stream)?;
    let mut agreed = Agreed::default();
    loop {
        let asked = OptionHeader::decode(&read(stream)?).map_err(io::Error::other)?;
        let mut data = vec![0; asked.len as usize];
        stream.read_exact(&mut data)?;
        let mut out = Vec::new();
        let mut reply = |reply, data: &[u8]| {
            OptionReplyHeader {
                option: asked.option,
                reply,
                len: data.len() as u32,
            }
            .encode(&mut out);
            out.extend_from_slice(data);
        };
        match asked.option {
            option::EXTENDED_HEADERS if offer.extended => {
                agreed.extended = true;
                reply(option_reply::ACK, &[]);
            }
            option::STRUCTURED_REPLY if offer.structured => {
                agreed.structured = true;
                reply(option_reply::ACK, &[]);
            }
            option::SET_META_CONTEXT if offer.allocation => {
                let mut data = Vec::new();
                encode_meta_context(7, offer.context, &mut data);
                reply(option_reply::META_CONTEXT, &data);
                reply(option_reply::ACK, &[]);
            }
            option::GO => {
                let mut data = info::EXPORT.to_be_bytes().to_vec();
                ExportInfo {
                    size: offer.size as u64,
                    flags: offer.flags,
                }
                .encode(&mut data);
                reply(option_reply::INFO, &data);
                if let Some((minimum, maximum)) = offer.blocks {
                    let mut data = Vec::new();
                    BlockSizes {
                        minimum,
                        preferred: minimum.max(4096),
                        maximum,
                    }
                    .encode(&mut data);
                    reply(option_reply::INFO, &data);
                }
                reply(option_reply::ACK, &[]);
            }
            _ => reply(option_reply::ERR_UNSUP, b"never heard of it"),
        }
        stream.write_all(&out)?;
        if asked.option == option::GO {
            return Ok(agreed);
        }
    }
}

fn transmit(
    shared: &Shared,
    offer: &Offer,
    agreed: Agreed,
    stream: &mut UnixStream,
) -> io::Result<()> {
    loop {
        let request = if agreed.extended {
            Request::decode_extended(&read(stream)?)
        } else {
            Request::decode_compact(&read(stream)?)
        }
        .map_err(io::Error::other)?;
        let mut data = Vec::new();
        if request.command == command::WRITE {
            data.resize(request.len as usize, 0);
            stream.read_exact(&mut data)?;
        }
        let mut state = lock(&shared.state);
        state
            .log
            .push((request.command, request.flags, request.offset, request.len));
        shared.changed.notify_all();
        if request.command == command::DISC || state.hangs_up {
            return Ok(());
        }
        if state.holding {
            state.held += 1;
            shared.changed.notify_all();
            drop(
                shared
                    .changed
                    .wait_while(state, |state| state.holding)
                    .unwrap_or_else(PoisonError::into_inner),
            );
            state = lock(&shared.state);
        }
        let answer = carry_out(offer, &mut state.disk, &request, &data);
        drop(state);
        stream.write_all(&encode(agreed, &request, answer))?;
    }
}

/// Gives an error, or the payload of a read or a block status.
fn carry_out(
    offer: &Offer,
    disk: &mut [u8],
    request: &Request,
    data: &[u8],
) -> Result<Vec<u8>, u32> {
    let block = offer.blocks.map_or(1, |blocks| u64::from(blocks.0));
    let max = offer.blocks.map_or(32 << 20, |blocks| u64::from(blocks.1));
    let aligned = (request.offset | request.len).is_multiple_of(block);
    let payload = matches!(request.command, command::READ | command::WRITE);
    if !aligned || (payload && request.len > max) {
        return Err(errno_to_wire(libc::EINVAL));
    }
    let from = request.offset as usize;
    let Some(range) = from
        .checked_add(request.len as usize)
        .and_then(|end| disk.get_mut(from..end))
    else {
        return Err(errno_to_wire(libc::ENOSPC));
    };
    match request.command {
        command::READ => return Ok(range.to_vec()),
        command::WRITE => range.copy_from_slice(data),
        command::TRIM | command::WRITE_ZEROES => range.fill(0),
        command::BLOCK_STATUS => {
            let zero = range[0] == 0;
            let len = range.iter().take_while(|byte| (**byte == 0) == zero);
            let len = (len.count() as u64).next_multiple_of(block);
            let mut payload = Vec::new();
            let extent = BlockDescriptor {
                len,
                status: if zero { 3 } else { 0 },
            };
            encode_block_status(false, 7, &[extent], &mut payload);
            return Ok(payload);
        }
        _ => {}
    }
    Ok(Vec::new())
}

fn encode(agreed: Agreed, request: &Request, answer: Result<Vec<u8>, u32>) -> Vec<u8> {
    let mut out = Vec::new();
    if !agreed.structured && !agreed.extended {
        SimpleReplyHeader {
            error: answer.as_ref().err().copied().unwrap_or(0),
            cookie: request.cookie,
        }
        .encode(&mut out);
        out.extend_from_slice(&answer.unwrap_or_default());
        return out;
    }
    let (kind, payload) = match (answer, request.command) {
        (Err(error), _) => {
            let mut payload = Vec::new();
            crate::nbd::protocol::encode_error_chunk(error, "no", &mut payload);
            (chunk::ERROR, payload)
        }
        (Ok(data), command::READ) => {
            let mut payload = request.offset.to_be_bytes().to_vec();
            payload.extend_from_slice(&data);
            (chunk::OFFSET_DATA, payload)
        }
        (Ok(extents), command::BLOCK_STATUS) if agreed.extended => {
            let (context, extents) =
                crate::nbd::protocol::decode_block_status(false, &extents).unwrap();
            let mut payload = Vec::new();
            encode_block_status(true, context, &extents, &mut payload);
            (chunk::BLOCK_STATUS_EXT, payload)
        }
        (Ok(extents), command::BLOCK_STATUS) => (chunk::BLOCK_STATUS, extents),
        (Ok(_), _) => (chunk::NONE, Vec::new()),
    };
    let header = ChunkHeader {
        flags: chunk_flag::DONE,
        kind,
        cookie: request.cookie,
        offset: request.offset,
        len: payload.len() as u64,
    };
    if agreed.extended {
        header.encode_extended(&mut out);
    } else {
        header.encode_structured(&mut out);
    }
    out.extend_from_slice(&payload);
    out
}
