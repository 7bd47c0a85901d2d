//! Sectors that say what they are.
//!
//! Each written 512-byte sector names its disk, its place and the generation
//! of the write that made it, and carries a checksum over all of that and a
//! payload that differs with each. So a sector that is misplaced, torn, stale
//! or damaged shows it by itself, to the guest as to the host.
//!
//! Layout, in little-endian 64-bit words: 0 magic, 1 sector number,
//! 2 generation, 3 disk number, 4..=62 payload, 63 checksum of words 0..=62.
//!
//! A block is a run of sectors made by one write; all share its generation.

/// Bytes of a sector (virtio 1.2 §5.2: the unit of every offset).
pub const SECTOR_BYTES: usize = 512;

const WORDS: usize = SECTOR_BYTES / 8;
const PAYLOAD: usize = 4;
const CHECKSUM: usize = WORDS - 1;
const MAGIC: u64 = u64::from_le_bytes(*b"diptych1");

/// Odd, with evenly mixed bits: 2^64 divided by the golden ratio.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// What a sector says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Number of the disk in the guest, from 0.
    pub disk: u32,
    /// The sector's place, from the start of the disk.
    pub sector: u64,
    /// Generation of the write, from 1; grows with each write to the disk.
    pub generation: u64,
}

/// What can be wrong with a sector or a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Damage {
    /// Neither zero nor a sector of ours.
    Foreign,
    /// Ours once, and altered since.
    Checksum,
    /// Intact, and meant for another place or another disk.
    Misplaced(Identity),
    /// Sectors of a block are of different writes: these two generations (0
    /// for zeroes).
    Torn(u64, u64),
}

impl Damage {
    /// One word for the report.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Foreign => "foreign",
            Self::Checksum => "checksum",
            Self::Misplaced(_) => "misplaced",
            Self::Torn(..) => "torn",
        }
    }
}

/// Makes `bytes` the block that starts at `first_sector`, as written by
/// `generation`. A rest of `bytes` shorter than a sector is left alone.
pub fn write_block(disk: u32, first_sector: u64, generation: u64, bytes: &mut [u8]) {
    let (sectors, _) = bytes.as_chunks_mut::<SECTOR_BYTES>();
    for (sector, bytes) in (first_sector..).zip(sectors) {
        write_sector(
            Identity {
                disk,
                sector,
                generation,
            },
            bytes,
        );
    }
}

/// The generation of the block that starts at `first_sector`; 0 if it reads as
/// zeroes.
///
/// Errors: the first damage found.
pub fn read_block(disk: u32, first_sector: u64, bytes: &[u8]) -> Result<u64, Damage> {
    let (sectors, _) = bytes.as_chunks::<SECTOR_BYTES>();
    let mut generation = None;
    for (sector, bytes) in (first_sector..).zip(sectors) {
        let found = match read_sector(bytes)? {
            None => 0,
            Some(identity) if identity.disk == disk && identity.sector == sector => {
                identity.generation
            }
            Some(identity) => return Err(Damage::Misplaced(identity)),
        };
        if *generation.get_or_insert(found) != found {
            return Err(Damage::Torn(generation.unwrap_or(0), found));
        }
    }
    Ok(generation.unwrap_or(0))
}

fn write_sector(identity: Identity, bytes: &mut [u8; SECTOR_BYTES]) {
    let mut words = [0; WORDS];
    words[0] = MAGIC;
    words[1] = identity.sector;
    words[2] = identity.generation;
    words[3] = u64::from(identity.disk);
    let seed = (identity.sector ^ identity.generation.rotate_left(32) ^ u64::from(identity.disk))
        .wrapping_mul(STEP);
    let mut word = seed;
    for payload in &mut words[PAYLOAD..CHECKSUM] {
        word = word.wrapping_add(STEP);
        *payload = word;
    }
    words[CHECKSUM] = checksum(&words);
    let (chunks, _) = bytes.as_chunks_mut::<8>();
    for (chunk, word) in chunks.iter_mut().zip(words) {
        *chunk = word.to_le_bytes();
    }
}

/// What the sector says of itself; `None` if it reads as zeroes.
fn read_sector(bytes: &[u8; SECTOR_BYTES]) -> Result<Option<Identity>, Damage> {
    let mut words = [0; WORDS];
    let (chunks, _) = bytes.as_chunks::<8>();
    for (word, chunk) in words.iter_mut().zip(chunks) {
        *word = u64::from_le_bytes(*chunk);
    }
    if words[0] != MAGIC {
        let zero = words.iter().fold(0, |any, word| any | word) == 0;
        return if zero { Ok(None) } else { Err(Damage::Foreign) };
    }
    let disk = u32::try_from(words[3]);
    match disk {
        Ok(disk) if words[CHECKSUM] == checksum(&words) && words[2] != 0 => Ok(Some(Identity {
            disk,
            sector: words[1],
            generation: words[2],
        })),
        _ => Err(Damage::Checksum),
    }
}

/// A checksum over all words but the last, position-dependent; four lanes, so
/// that the multiplications overlap.
fn checksum(words: &[u64; WORDS]) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    for (i, word) in words[..CHECKSUM].iter().enumerate() {
        let lane = &mut lanes[i % 4];
        *lane = (*lane ^ word).wrapping_mul(STEP).rotate_left(29);
    }
    lanes.into_iter().fold(0, |sum, lane| {
        (sum ^ lane).wrapping_mul(STEP).rotate_left(29)
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn zeroes_are_generation_zero() {
        assert_eq!(read_block(0, 8, &[0; 4096]), Ok(0));
    }

    #[test]
    fn a_block_mixed_from_two_writes_is_torn() {
        let mut block = [0; 1024];
        write_block(1, 2, 5, &mut block);
        write_block(1, 3, 6, &mut block[512..]);
        assert_eq!(read_block(1, 2, &block), Err(Damage::Torn(5, 6)));
        block[512..].fill(0);
        assert_eq!(read_block(1, 2, &block), Err(Damage::Torn(5, 0)));
    }

    #[test]
    fn text_is_foreign() {
        let mut sector = [0; 512];
        sector[511] = b'x';
        assert_eq!(read_block(0, 0, &sector), Err(Damage::Foreign));
    }

    proptest! {
        #[test]
        fn a_block_reads_as_it_was_written(disk: u32, at in 0..u64::MAX / 2, generation in 1..u64::MAX) {
            let mut block = [0; 2048];
            write_block(disk, at, generation, &mut block);
            prop_assert_eq!(read_block(disk, at, &block), Ok(generation));
            let elsewhere = read_block(disk, at + 1, &block);
            prop_assert!(matches!(elsewhere, Err(Damage::Misplaced(id)) if id.sector == at));
            let other_disk = read_block(disk.wrapping_add(1), at, &block);
            prop_assert!(matches!(other_disk, Err(Damage::Misplaced(_))));
        }

        #[test]
        fn every_flipped_bit_is_noticed(generation in 1..u64::MAX, bit in 0..512usize * 8) {
            let mut block = [0; 512];
            write_block(0, 7, generation, &mut block);
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(read_block(0, 7, &block).is_err());
        }
    }
}
