//! Reading the file of a backup: its data and its zeroes, in order, and the hash of both.
//!
//! The hash does not depend on how sparse the file is, and costs nothing for holes: it is
//! the SHA-256 of, for each block that is not all zeroes, its offset and length (64 bits
//! each, little endian) and its bytes. Blocks are 64 KiB of the disk, cut off at the ends of
//! the ranges that the backup holds.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;
use sha2::{Digest as _, Sha256};

use super::SetError;

/// Unit of the hash in bytes.
pub const BLOCK: u64 = 64 << 10;
/// Most bytes of zeroes that are told at once.
const MAX_ZEROES: u64 = 1 << 30;

/// A part of what a backup holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// Zeroes.
    Zeroes(Range<u64>),
    /// Other bytes, from an offset on: at most [`BLOCK`].
    Data(u64, &'a [u8]),
}

/// What was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    /// In hexadecimal digits.
    pub sha256: String,
    /// Bytes of blocks that are not all zeroes.
    pub data_bytes: u64,
}

/// Reads all of `ranges` (in order and apart) of `file`, whose name `path` is for errors,
/// and hands each part to `sink`, in order and without gaps inside a range.
///
/// Errors: those of the file and of `sink`; a file that is shorter than the ranges.
pub fn read(
    file: &File,
    path: &Path,
    ranges: &[Range<u64>],
    mut sink: impl FnMut(Part<'_>) -> Result<(), SetError>,
) -> Result<Digest, SetError> {
    let mut buffer = vec![0; BLOCK as usize];
    let (mut hash, mut data_bytes) = (Sha256::new(), 0);
    for range in ranges {
        let mut at = range.start;
        while at < range.end {
            let data = next_data(file, at).map_err(SetError::io("read", path))?;
            // Whole blocks, wherever the file system begins its own.
            let data = data.map_or(range.end, |data| (data / BLOCK * BLOCK).max(at));
            let end = data.min(range.end).min(at.saturating_add(MAX_ZEROES));
            if end > at {
                sink(Part::Zeroes(at..end))?;
                at = end;
                continue;
            }
            let end = range.end.min((at / BLOCK + 1) * BLOCK);
            let block = buffer.get_mut(..(end - at) as usize).unwrap_or_default();
            file.read_exact_at(block, at)
                .map_err(SetError::io("read", path))?;
            if block.iter().all(|byte| *byte == 0) {
                sink(Part::Zeroes(at..end))?;
            } else {
                hash.update(at.to_le_bytes());
                hash.update((end - at).to_le_bytes());
                hash.update(&*block);
                data_bytes += end - at;
                sink(Part::Data(at, block))?;
            }
            at = end;
        }
    }
    Ok(Digest {
        sha256: hex(&hash.finalize()),
        data_bytes,
    })
}

/// Where the first byte at or after `at` is that may not be a zero; `None` if there is
/// none.
fn next_data(file: &File, at: u64) -> std::io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // File systems without holes.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok(Some(at)),
        Err(error) => Err(error.into()),
    }
}

/// The SHA-256 of `bytes`, as it is written.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn digest(file: &File, ranges: &[Range<u64>]) -> (Digest, Vec<u8>) {
        let mut seen = Vec::new();
        let digest = read(file, Path::new("f"), ranges, |part| {
            match part {
                Part::Zeroes(range) => {
                    seen.resize(seen.len() + (range.end - range.start) as usize, 0);
                }
                Part::Data(_, bytes) => seen.extend_from_slice(bytes),
            }
            Ok(())
        });
        (digest.unwrap(), seen)
    }

    #[test]
    fn the_hash_is_that_of_the_content_however_sparse_the_file_is() {
        let size = 10 * BLOCK + 1536;
        let mut content = vec![0; size as usize];
        for at in [0, 3 * BLOCK + 5, 7 * BLOCK, size - 1] {
            content[at as usize] = 7;
        }
        let mut dense = tempfile::tempfile().unwrap();
        dense.write_all(&content).unwrap();
        let sparse = tempfile::tempfile().unwrap();
        sparse.set_len(size).unwrap();
        for (number, block) in content.chunks(512).enumerate() {
            if block.iter().any(|byte| *byte != 0) {
                sparse.write_all_at(block, number as u64 * 512).unwrap();
            }
        }
        let all = std::slice::from_ref(&(0..size)).to_vec();
        let (of_dense, seen) = digest(&dense, &all);
        assert_eq!(seen, content);
        assert_eq!(digest(&sparse, &all), (of_dense.clone(), seen));
        assert_eq!(of_dense.data_bytes, 3 * BLOCK + 1536);
        let parts = [512..BLOCK + 512, 3 * BLOCK..3 * BLOCK + 512];
        let (of_part, seen) = digest(&dense, &parts);
        assert_eq!(seen.len(), BLOCK as usize + 512);
        assert_eq!(digest(&sparse, &parts), (of_part.clone(), seen));
        assert_eq!(of_part.data_bytes, 512);
        dense.write_all_at(&[8], 3 * BLOCK + 5).unwrap();
        assert_ne!(digest(&dense, &parts).0, of_part);
        assert_ne!(digest(&dense, &all).0, of_dense);
    }

    #[test]
    fn data_elsewhere_is_another_content() {
        let file = |at: u64| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4 * BLOCK).unwrap();
            file.write_all_at(&[1; 512], at).unwrap();
            file
        };
        let all = std::slice::from_ref(&(0..4 * BLOCK)).to_vec();
        let one = digest(&file(0), &all).0;
        assert_ne!(digest(&file(BLOCK), &all).0, one);
    }

    #[test]
    fn a_file_that_is_too_short_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        file.write_all_at(&[1; 100], 0).unwrap();
        let all = std::slice::from_ref(&(0..BLOCK)).to_vec();
        assert!(read(&file, Path::new("f"), &all, |_| Ok(())).is_err());
    }
}
