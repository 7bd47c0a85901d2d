//! What holds for a node whatever its driver, in one word.

use crate::options::{CacheOptions, DetectZeroes, DiscardMode};

/// What holds for a node whatever its driver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NodeOptions {
    /// Writes are refused.
    pub read_only: bool,
    /// What a discard does.
    pub discard: DiscardMode,
    /// What a write of zeroes as data does.
    pub detect_zeroes: DetectZeroes,
    /// Cache behaviour. `direct` is the driver's business and only shown here.
    pub cache: CacheOptions,
}

impl NodeOptions {
    const READ_ONLY: u8 = 1;
    const UNMAP: u8 = 2;
    const DIRECT: u8 = 4;
    const NO_FLUSH: u8 = 8;
    const DETECT_ZEROES: u8 = 16;
    const DETECT_AND_UNMAP: u8 = 32;

    pub(super) fn pack(self) -> u8 {
        let bit = |set: bool, bit: u8| if set { bit } else { 0 };
        bit(self.read_only, Self::READ_ONLY)
            | bit(self.discard == DiscardMode::Unmap, Self::UNMAP)
            | bit(self.cache.direct, Self::DIRECT)
            | bit(self.cache.no_flush, Self::NO_FLUSH)
            | match self.detect_zeroes {
                DetectZeroes::Off => 0,
                DetectZeroes::On => Self::DETECT_ZEROES,
                DetectZeroes::Unmap => Self::DETECT_AND_UNMAP,
            }
    }

    pub(super) fn unpack(bits: u8) -> Self {
        let has = |bit: u8| bits & bit != 0;
        Self {
            read_only: has(Self::READ_ONLY),
            discard: if has(Self::UNMAP) {
                DiscardMode::Unmap
            } else {
                DiscardMode::Ignore
            },
            detect_zeroes: if has(Self::DETECT_AND_UNMAP) {
                DetectZeroes::Unmap
            } else if has(Self::DETECT_ZEROES) {
                DetectZeroes::On
            } else {
                DetectZeroes::Off
            },
            cache: CacheOptions {
                direct: has(Self::DIRECT),
                no_flush: has(Self::NO_FLUSH),
            },
        }
    }
}
