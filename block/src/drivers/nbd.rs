//! `nbd`: an export of an NBD server as a node.
//!
//! Requests are made to fit here: inside the export's size, whole blocks, no longer
//! than the server takes. The connection is `crate::nbd::client`'s.

use std::sync::Arc;

use crate::buffer::{AlignedBuffer, IoVec};
use crate::driver::{
    BlockDriver, BoxFuture, CancelReach, Extent, ExtentFlags, Limits, Reopen, Reopened, WriteFlags,
    ZeroFlags,
};
use crate::drivers::{OpenError, ReopenError};
use crate::error::{IoError, IoOp};
use crate::nbd::client::{Client, Command, Export, NbdError, Status};
use crate::nbd::protocol::{
    BASE_ALLOCATION, DIRTY, allocation_flag, command, command_flag, transmission_flag,
};
use crate::options::{DriverOptions, NbdOptions, SocketAddress};
use crate::range_lock::{RangeGuard, RangeLock};
use crate::runtime::unblock;

#[cfg(all(test, not(shuttle)))]
mod tests;

/// Unit of requests that nodes know, in bytes.
const SECTOR: u32 = 512;
/// Zeroes that fill up blocks come from a buffer of this size: the largest block.
const MAX_BLOCK: usize = 64 << 10;

const DATA: ExtentFlags = ExtentFlags {
    data: true,
    zero: false,
    allocated: true,
};

/// An export of an NBD server.
pub struct NbdDriver {
    node: Arc<str>,
    client: Client,
    filename: String,
    /// Block status is that of `base:allocation`.
    tells_holes: bool,
    read_only: bool,
    /// Orders writes that rewrite a part of a block, where blocks are larger than
    /// sectors.
    writing: RangeLock,
}

/// A part of a request: whole blocks, or less than one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u64,
    whole: bool,
}

impl NbdDriver {
    /// Opens the export that `options` name, for reading only if `read_only` says
    /// so, or if nothing else is possible and `auto_read_only` allows it.
    ///
    /// Takes [`NbdOptions::open_timeout`] at most, 30 s if there is none, and blocks no
    /// thread. Cancel: the connection is given up.
    pub async fn open(
        node: &str,
        options: &NbdOptions,
        read_only: bool,
        auto_read_only: bool,
    ) -> Result<Self, OpenError> {
        let client = Client::open(node, options).await?;
        let fixed = client.export().can(transmission_flag::READ_ONLY);
        if fixed && !read_only && !auto_read_only {
            // On a helper thread, since it takes leave of the server.
            unblock(move || client.close()).await;
            return Err(NbdError::ReadOnly.into());
        }
        Ok(Self {
            node: node.into(),
            client,
            filename: filename(&options.server, &options.export),
            tells_holes: tells_holes(options),
            read_only: read_only || fixed,
            writing: RangeLock::new(),
        })
    }

    /// Whether it was opened for reading only, asked for or as a fallback.
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    fn export(&self) -> &Export {
        self.client.export()
    }

    /// Blocks that the server insists on, if they are larger than sectors.
    fn block(&self) -> Option<u64> {
        (self.export().min_block > SECTOR).then_some(self.export().min_block.into())
    }

    /// How much of `len` bytes at `offset` the export has: less only in the last
    /// sector.
    fn inside(&self, offset: u64, len: u64) -> u64 {
        self.export().size.saturating_sub(offset).min(len)
    }

    /// `offset..offset + len` in pieces: a part of a block, whole blocks, a part of a
    /// block.
    fn pieces(&self, offset: u64, len: u64) -> impl Iterator<Item = Piece> + use<> {
        let block = self.block().unwrap_or(1);
        let end = offset + len;
        let first = offset.next_multiple_of(block).min(end);
        let last = (end - end % block).max(first);
        [
            (offset, first, false),
            (first, last, true),
            (last, end, false),
        ]
        .into_iter()
        .filter(|(from, to, _)| from < to)
        .map(|(from, to, whole)| Piece {
            offset: from,
            len: to - from,
            whole,
        })
    }

    /// Locks the blocks of a write where a neighbour may be rewriting one.
    async fn lock(&self, offset: u64, len: u64) -> Option<Arc<RangeGuard>> {
        let block = self.block()?;
        let range = offset - offset % block..(offset + len).next_multiple_of(block);
        Some(Arc::new(self.writing.lock(range).await))
    }

    async fn read_from(&self, offset: u64, iov: IoVec) -> Result<(), i32> {
        let len = self.inside(offset, iov.len() as u64);
        iov.slice(len as usize, iov.len() - len as usize).fill(0);
        for piece in self.pieces(offset, len) {
            let part = iov.slice((piece.offset - offset) as usize, piece.len as usize);
            if piece.whole {
                self.transfer(command::READ, 0, piece.offset, part, None)
                    .await?;
            } else {
                let (_, whole, from) = self.read_block(piece.offset).await?;
                part.copy_from_iov(0, &whole.slice(from, piece.len as usize));
            }
        }
        Ok(())
    }

    /// Reads the block around `offset`: its start, its content, and where in it
    /// `offset` is.
    async fn read_block(&self, offset: u64) -> Result<(u64, IoVec, usize), i32> {
        let block = self.export().min_block;
        let within = offset % u64::from(block);
        let start = offset - within;
        // Bounded when it was agreed on.
        let whole = AlignedBuffer::new(block as usize).io_vec(block as usize);
        self.transfer(command::READ, 0, start, whole.clone(), None)
            .await?;
        Ok((start, whole, within as usize))
    }

    async fn write_from(&self, offset: u64, iov: IoVec, flags: WriteFlags) -> Result<(), i32> {
        let len = self.inside(offset, iov.len() as u64);
        if !iov.slice(len as usize, iov.len() - len as usize).is_zero() {
            // What the export has not of the last sector reads as zeroes.
            return Err(libc::ENOSPC);
        }
        let range = self.lock(offset, len).await;
        let fua = self.fua(flags.fua);
        for piece in self.pieces(offset, len) {
            let part = iov.slice((piece.offset - offset) as usize, piece.len as usize);
            self.write_piece(piece, part, fua, range.clone()).await?;
        }
        drop(range);
        self.fua_by_flush(flags.fua).await
    }

    async fn write_piece(
        &self,
        piece: Piece,
        part: IoVec,
        fua: u16,
        range: Option<Arc<RangeGuard>>,
    ) -> Result<(), i32> {
        let (offset, data) = if piece.whole {
            (piece.offset, part)
        } else {
            let (start, whole, from) = self.read_block(piece.offset).await?;
            whole.copy_from_iov(from, &part);
            (start, whole)
        };
        self.transfer(command::WRITE, fua, offset, data, range)
            .await
    }

    async fn zero(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<(), i32> {
        let export = self.export();
        let mut how = self.fua(flags.fua);
        if !export.can(transmission_flag::SEND_WRITE_ZEROES) {
            return Err(libc::EOPNOTSUPP);
        }
        if flags.no_fallback {
            if !export.can(transmission_flag::SEND_FAST_ZERO) {
                return Err(libc::EOPNOTSUPP);
            }
            how |= command_flag::FAST_ZERO;
        }
        if !flags.may_unmap {
            how |= command_flag::NO_HOLE;
        }
        let len = self.inside(offset, len);
        let range = self.lock(offset, len).await;
        for piece in self.pieces(offset, len) {
            if piece.whole {
                self.without_payload(
                    command::WRITE_ZEROES,
                    how,
                    piece.offset,
                    piece.len,
                    range.clone(),
                )
                .await?;
            } else {
                let zeroes = AlignedBuffer::new(MAX_BLOCK).io_vec(piece.len as usize);
                let fua = self.fua(flags.fua);
                self.write_piece(piece, zeroes, fua, range.clone()).await?;
            }
        }
        drop(range);
        self.fua_by_flush(flags.fua).await
    }

    async fn trim(&self, offset: u64, len: u64) -> Result<(), i32> {
        if !self.export().can(transmission_flag::SEND_TRIM) {
            return Err(libc::EOPNOTSUPP);
        }
        let len = self.inside(offset, len);
        let range = self.lock(offset, len).await;
        // Parts of blocks keep what they have: it is a hint.
        for piece in self.pieces(offset, len).filter(|piece| piece.whole) {
            self.without_payload(command::TRIM, 0, piece.offset, piece.len, range.clone())
                .await?;
        }
        Ok(())
    }

    async fn sync(&self) -> Result<(), i32> {
        if !self.export().can(transmission_flag::SEND_FLUSH) {
            return Ok(());
        }
        let command = Command {
            kind: command::FLUSH,
            flags: 0,
            offset: 0,
            len: 0,
            iov: None,
            _range: None,
        };
        self.client.request(command).await.map(drop)
    }

    async fn status(&self, offset: u64, len: u64) -> Result<Extent, i32> {
        let inside = self.inside(offset, len);
        if !self.export().has_status() || inside == 0 {
            return Ok(Extent { len, flags: DATA });
        }
        let block = self.block().unwrap_or(1);
        let start = offset - offset % block;
        let end = (offset + inside).next_multiple_of(block);
        let command = Command {
            kind: command::BLOCK_STATUS,
            flags: command_flag::REQ_ONE,
            offset: start,
            len: (end - start).min(self.export().max_range()),
            iov: None,
            _range: None,
        };
        let found = self.client.request(command).await?;
        let Some(Status { len: found, flags }) = found else {
            return Ok(Extent { len, flags: DATA });
        };
        // Other contexts know nothing of zeroes.
        let zero = self.tells_holes && flags & u64::from(allocation_flag::ZERO) != 0;
        let data = match self.tells_holes {
            // A hole of unknown content is read, to be sure.
            true => !zero,
            // As QEMU has it: dirty is what is no data.
            false => flags & u64::from(DIRTY) == 0,
        };
        let found = found.saturating_sub(offset - start).min(inside);
        if found == 0 {
            // An extent of less than a block: no sense in it.
            return Ok(Extent { len, flags: DATA });
        }
        Ok(Extent {
            // What the export has not of the last sector goes with its end.
            len: if found == inside { len } else { found },
            flags: ExtentFlags {
                data,
                zero,
                allocated: true,
            },
        })
    }

    /// Reads or writes `iov.len()` bytes, in as many requests as the server needs.
    async fn transfer(
        &self,
        kind: u16,
        flags: u16,
        offset: u64,
        iov: IoVec,
        range: Option<Arc<RangeGuard>>,
    ) -> Result<(), i32> {
        let max = self.export().max_payload as usize;
        let mut done = 0;
        while done < iov.len() {
            let len = max.min(iov.len() - done);
            let command = Command {
                kind,
                flags,
                offset: offset + done as u64,
                len: len as u64,
                iov: Some(if len == iov.len() {
                    iov.clone()
                } else {
                    iov.slice(done, len)
                }),
                _range: range.clone(),
            };
            self.client.request(command).await?;
            done += len;
        }
        Ok(())
    }

    /// As [`transfer`](Self::transfer), for what has no data.
    async fn without_payload(
        &self,
        kind: u16,
        flags: u16,
        offset: u64,
        len: u64,
        range: Option<Arc<RangeGuard>>,
    ) -> Result<(), i32> {
        let max = self.export().max_range();
        let mut done = 0;
        while done < len {
            let piece = max.min(len - done);
            let command = Command {
                kind,
                flags,
                offset: offset + done,
                len: piece,
                iov: None,
                _range: range.clone(),
            };
            self.client.request(command).await?;
            done += piece;
        }
        Ok(())
    }

    /// The flag of a durable write, where the server has it.
    fn fua(&self, wanted: bool) -> u16 {
        match wanted && self.export().can(transmission_flag::SEND_FUA) {
            true => command_flag::FUA,
            false => 0,
        }
    }

    /// Makes a write durable that could not be written so.
    async fn fua_by_flush(&self, wanted: bool) -> Result<(), i32> {
        if wanted && self.fua(true) == 0 {
            return self.sync().await;
        }
        Ok(())
    }

    fn error(&self, op: IoOp, offset: u64, len: u64) -> impl FnOnce(i32) -> IoError {
        let node = Arc::clone(&self.node);
        move |errno| IoError {
            op,
            node,
            offset,
            len,
            errno,
        }
    }
}

impl BlockDriver for NbdDriver {
    fn name(&self) -> &'static str {
        "nbd"
    }

    fn size(&self) -> u64 {
        self.export().size
    }

    fn limits(&self) -> Limits {
        let export = self.export();
        Limits {
            request_alignment: export.min_block.max(SECTOR),
            zero_alignment: export.preferred_block.max(SECTOR),
            max_transfer: export.max_payload,
            cluster_size: None,
            can_zero_fast: export.can(transmission_flag::SEND_WRITE_ZEROES),
        }
    }

    fn filename(&self) -> String {
        self.filename.clone()
    }

    /// The connection stays as it is. Only what the node does with it can change.
    fn reopen_prepare<'a>(
        &'a self,
        to: Reopen<'a>,
    ) -> BoxFuture<'a, Result<Reopened, ReopenError>> {
        Box::pin(async move {
            let fixed = self.export().can(transmission_flag::READ_ONLY);
            if fixed && !to.options.read_only && !to.auto_read_only {
                return Err(OpenError::from(NbdError::ReopenReadOnly).into());
            }
            if let (DriverOptions::Nbd(old), DriverOptions::Nbd(new)) = (to.old, to.driver) {
                let options = [
                    ("export", old.export == new.export),
                    ("x-dirty-bitmap", old.dirty_bitmap == new.dirty_bitmap),
                    (
                        "reconnect-delay",
                        old.reconnect_delay == new.reconnect_delay,
                    ),
                    ("open-timeout", old.open_timeout == new.open_timeout),
                    ("server", old.server == new.server),
                ];
                if let Some((name, _)) = options.iter().find(|(_, same)| !same) {
                    return Err(ReopenError::CannotChange((*name).to_owned()));
                }
            }
            Ok(Reopened {
                read_only: to.options.read_only || fixed,
                size: None,
            })
        })
    }

    fn read<'a>(&'a self, offset: u64, iov: IoVec) -> BoxFuture<'a, Result<(), IoError>> {
        let error = self.error(IoOp::Read, offset, iov.len() as u64);
        Box::pin(async move { self.read_from(offset, iov).await.map_err(error) })
    }

    fn write<'a>(
        &'a self,
        offset: u64,
        iov: IoVec,
        flags: WriteFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        let error = self.error(IoOp::Write, offset, iov.len() as u64);
        Box::pin(async move { self.write_from(offset, iov, flags).await.map_err(error) })
    }

    fn write_zeroes<'a>(
        &'a self,
        offset: u64,
        len: u64,
        flags: ZeroFlags,
    ) -> BoxFuture<'a, Result<(), IoError>> {
        let error = self.error(IoOp::WriteZeroes, offset, len);
        Box::pin(async move { self.zero(offset, len, flags).await.map_err(error) })
    }

    fn discard<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<(), IoError>> {
        let error = self.error(IoOp::Discard, offset, len);
        Box::pin(async move { self.trim(offset, len).await.map_err(error) })
    }

    fn flush<'a>(&'a self) -> BoxFuture<'a, Result<(), IoError>> {
        let error = self.error(IoOp::Flush, 0, 0);
        Box::pin(async move { self.sync().await.map_err(error) })
    }

    fn block_status<'a>(&'a self, offset: u64, len: u64) -> BoxFuture<'a, Result<Extent, IoError>> {
        let error = self.error(IoOp::BlockStatus, offset, len);
        Box::pin(async move { self.status(offset, len).await.map_err(error) })
    }

    fn cancel_in_flight(&self, reach: CancelReach) {
        self.client.cancel(reach);
    }

    fn close(&self) {
        self.client.close();
    }
}

/// Whether block status is that of `base:allocation`.
fn tells_holes(options: &NbdOptions) -> bool {
    let context = options.dirty_bitmap.as_deref();
    context.is_none_or(|context| context == BASE_ALLOCATION)
}

/// The export as QEMU writes it: a URI, without escapes.
fn filename(server: &SocketAddress, export: &str) -> String {
    match server {
        SocketAddress::Unix { path, .. } if export.is_empty() => {
            format!("nbd+unix://?socket={}", path.display())
        }
        SocketAddress::Unix { path, .. } => {
            format!("nbd+unix:///{export}?socket={}", path.display())
        }
        SocketAddress::Inet(inet) if export.is_empty() => {
            format!("nbd://{}:{}", inet.host, inet.port)
        }
        SocketAddress::Inet(inet) => format!("nbd://{}:{}/{export}", inet.host, inet.port),
    }
}
