//! The proof that the mirror lost nothing.
//!
//! Every sector on either image names its place and the generation of the write
//! that made it; generations grow with each write to the disk. The guest tells a
//! digest over the generations that it knows to be on the disk. From that
//! follows, with no word of the mirror taken for granted:
//!
//! 1. **The target holds exactly what the guest wrote.** Its digest, computed
//!    here from the image, is the guest's: every acknowledged write of the whole
//!    run is there, in its place, whole, and nothing older or newer.
//! 2. **Source and target were equal at the pivot.** After the pivot nobody
//!    writes the source, so it shows that moment. Let `P` be its newest
//!    generation. Where the two differ, the target must be newer, by a write
//!    that went past the source, that is, after the pivot. Such a write was
//!    still under way when, or begun after, `P` was begun; the guest reports how
//!    far writes overtook each other (its lag), so the target's generation is
//!    at least `P` minus the lag. Anything else is a write that one side lost.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use guest::record::Digest;
use guest::sector::{Damage, SECTOR_BYTES, read_block};
use serde::Serialize;

use super::report;

/// What is read of each image at a time, in bytes.
const CHUNK: u64 = 1 << 20;

/// Why the images cannot be compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// An image cannot be read.
    #[error("Cannot read '{path}'", path = path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What was found. All counts are blocks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Verdict {
    /// Compared.
    pub blocks: u64,
    /// The same on both sides.
    pub equal: u64,
    /// Newer on the target, by writes after the pivot: as it should be.
    pub rewritten_after_pivot: u64,
    /// Older on the target, or newer by a write before the pivot: lost on one
    /// side.
    pub lost: u64,
    /// Torn, misplaced, altered or foreign on either side.
    pub damaged: u64,
    /// Whether the target's digest is the guest's.
    pub digest_matches: bool,
    /// Whether the images have the same size.
    pub sizes_match: bool,
    /// What was wrong first.
    pub first_fault: Option<String>,
}

impl Verdict {
    /// Whether everything is as it must be.
    pub fn is_identical(&self) -> bool {
        self.lost == 0 && self.damaged == 0 && self.digest_matches && self.sizes_match
    }

    fn fault(&mut self, what: impl FnOnce() -> String) {
        if self.first_fault.is_none() {
            self.first_fault = Some(what());
        }
    }
}

/// Compares the images with each other and with the guest's record of disk 0.
///
/// Errors: an image cannot be read. Differences are no errors.
pub fn verify(
    source: &Path,
    target: &Path,
    block: u64,
    disk: &report::Disk,
) -> Result<Verdict, VerifyError> {
    let source = read_generations(source, block, disk.span)?;
    let target = read_generations(target, block, disk.span)?;
    Ok(compare(&source, &target, disk))
}

/// What an image holds: the generation of each block, and what is wrong with
/// it.
struct Content {
    generations: Vec<Result<u64, Damage>>,
    bytes: u64,
}

fn read_generations(path: &Path, block: u64, span: u64) -> Result<Content, VerifyError> {
    let failed = |source| VerifyError::Read {
        path: path.to_owned(),
        source,
    };
    let mut file = File::open(path).map_err(failed)?;
    let bytes = file.metadata().map_err(failed)?.len();
    let mut left = bytes.min(span * SECTOR_BYTES as u64);
    let mut generations = Vec::new();
    let mut chunk = vec![0; (CHUNK / block).max(1) as usize * block as usize];
    let mut sector = 0;
    while left > 0 {
        let len = left.min(chunk.len() as u64) as usize;
        file.read_exact(&mut chunk[..len]).map_err(failed)?;
        left -= len as u64;
        for bytes in chunk[..len].chunks(block as usize) {
            generations.push(read_block(0, sector, bytes));
            sector += (bytes.len() / SECTOR_BYTES) as u64;
        }
    }
    Ok(Content { generations, bytes })
}

fn compare(source: &Content, target: &Content, disk: &report::Disk) -> Verdict {
    let mut verdict = Verdict {
        blocks: target.generations.len() as u64,
        sizes_match: source.bytes == target.bytes,
        ..Verdict::default()
    };
    let newest = source.generations.iter().flatten().copied().max();
    let pivot = newest.unwrap_or(0).saturating_sub(disk.lag);
    let mut digest = Digest::new();
    let pairs = source.generations.iter().zip(&target.generations);
    for (number, (&source, &target)) in (0u64..).zip(pairs) {
        let (source, target) = match (source, target) {
            (Ok(source), Ok(target)) => (source, target),
            (source, target) => {
                verdict.damaged += 1;
                verdict.fault(|| format!("block {number}: source {source:?}, target {target:?}"));
                continue;
            }
        };
        digest.add(target);
        if source == target {
            verdict.equal += 1;
        } else if target > source && target >= pivot {
            verdict.rewritten_after_pivot += 1;
        } else {
            verdict.lost += 1;
            verdict.fault(|| {
                format!(
                    "block {number}: source has write {source}, target {target}; \
                     the pivot was not before {pivot}"
                )
            });
        }
    }
    verdict.digest_matches = format!("{:016x}", digest.finish()) == disk.digest;
    if !verdict.digest_matches {
        verdict.fault(|| "the target does not hold what the guest wrote".into());
    }
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The verdict on these generations, where the guest knows of `known`.
    fn verdict(source: &[u64], target: &[u64], known: &[u64], lag: u64) -> Verdict {
        let content = |generations: &[u64]| Content {
            generations: generations.iter().copied().map(Ok).collect(),
            bytes: 4096,
        };
        let mut digest = Digest::new();
        known.iter().for_each(|&generation| digest.add(generation));
        let disk = report::Disk {
            span: 8,
            lag,
            digest: format!("{:016x}", digest.finish()),
            depth: 4,
            failed: 0,
            bad: 0,
        };
        compare(&content(source), &content(target), &disk)
    }

    #[test]
    fn writes_after_the_pivot_are_no_fault() {
        let found = verdict(&[1, 5, 0, 4], &[1, 5, 9, 7], &[1, 5, 9, 7], 1);
        assert!(found.is_identical(), "{found:?}");
        assert_eq!((found.equal, found.rewritten_after_pivot), (2, 2));
    }

    #[test]
    fn a_write_that_the_target_lacks_is_lost() {
        let found = verdict(&[1, 5], &[1, 3], &[1, 3], 0);
        assert_eq!(found.lost, 1);
        assert!(!found.is_identical());
    }

    #[test]
    fn a_write_before_the_pivot_that_only_the_target_has_is_lost() {
        // Write 3 went past the source although write 9 came later and did not.
        let found = verdict(&[9, 1], &[9, 3], &[9, 3], 2);
        assert_eq!(found.lost, 1);
        assert!(!found.is_identical());
    }

    #[test]
    fn a_write_held_over_the_pivot_may_be_older_by_the_lag() {
        let found = verdict(&[9, 1], &[9, 7], &[9, 7], 2);
        assert!(found.is_identical(), "{found:?}");
    }

    #[test]
    fn a_write_that_both_lost_shows_in_the_digest() {
        let found = verdict(&[1, 2], &[1, 2], &[1, 3], 0);
        assert_eq!((found.lost, found.damaged), (0, 0));
        assert!(!found.digest_matches && !found.is_identical());
    }

    #[test]
    fn files_are_read_block_by_block_and_damage_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        let mut bytes = vec![0; 16384];
        guest::sector::write_block(0, 8, 42, &mut bytes[4096..8192]);
        guest::sector::write_block(0, 0, 43, &mut bytes[8192..12288]);
        bytes[12288] = 1;
        std::fs::write(&path, &bytes).unwrap();
        let content = read_generations(&path, 4096, 32).unwrap();
        assert_eq!(content.bytes, 16384);
        assert_eq!(content.generations[..2], [Ok(0), Ok(42)]);
        assert!(matches!(content.generations[2], Err(Damage::Misplaced(_))));
        assert_eq!(content.generations[3], Err(Damage::Foreign));
    }
}
