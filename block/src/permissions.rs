//! What a user of a node needs and what it lets others do.
//!
//! The numbers are QEMU's (`BLK_PERM_*`), because image locking shows them to
//! other processes as byte offsets.

use std::fmt;
use std::ops::{BitAnd, BitOr, BitOrAssign, Not};

/// A set of permissions on a node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Perm(u8);

impl Perm {
    /// None.
    pub const NONE: Self = Self(0);
    /// Reads see data that makes sense (it is not half rewritten by others).
    pub const CONSISTENT_READ: Self = Self(1);
    /// Writes that change the visible data.
    pub const WRITE: Self = Self(2);
    /// Writes that leave the visible data as it is (copy-on-read, …).
    pub const WRITE_UNCHANGED: Self = Self(4);
    /// Changing the size.
    pub const RESIZE: Self = Self(8);
    /// All.
    pub const ALL: Self = Self(15);

    /// Each single permission and its bit number, in order.
    pub const EACH: [Self; 4] = [
        Self::CONSISTENT_READ,
        Self::WRITE,
        Self::WRITE_UNCHANGED,
        Self::RESIZE,
    ];

    /// Whether all of `other` are in this set.
    pub fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Whether some of `other` are in this set.
    pub fn intersects(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }

    /// Whether the set is empty.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// The set without `other`.
    pub const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    /// The single permissions of the set.
    pub fn iter(self) -> impl Iterator<Item = Self> {
        Self::EACH.into_iter().filter(move |p| self.contains(*p))
    }

    /// Bit number of the lowest permission of the set (0 to 3; 8 if empty).
    pub fn bit(self) -> u32 {
        self.0.trailing_zeros()
    }
}

impl BitOr for Perm {
    type Output = Self;
    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitOrAssign for Perm {
    fn bitor_assign(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

impl BitAnd for Perm {
    type Output = Self;
    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Not for Perm {
    type Output = Self;
    fn not(self) -> Self {
        Self::ALL.without(self)
    }
}

impl fmt::Display for Perm {
    /// QEMU's words: `consistent read, write`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut first = true;
        for perm in self.iter() {
            if !first {
                f.write_str(", ")?;
            }
            first = false;
            f.write_str(match perm {
                Self::CONSISTENT_READ => "consistent read",
                Self::WRITE => "write",
                Self::WRITE_UNCHANGED => "write unchanged",
                _ => "resize",
            })?;
        }
        Ok(())
    }
}

/// What one user of a node needs, and what it lets others do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// What the user does.
    pub need: Perm,
    /// What others may do meanwhile.
    pub share: Perm,
}

impl Permissions {
    /// Needs nothing and shares all.
    pub const IDLE: Self = Self {
        need: Perm::NONE,
        share: Perm::ALL,
    };

    /// What a node must hold for two users together.
    pub fn and(self, other: Self) -> Self {
        Self {
            need: self.need | other.need,
            share: self.share & other.share,
        }
    }
}

impl Default for Permissions {
    fn default() -> Self {
        Self::IDLE
    }
}

/// Why a node cannot have the permissions that its users want.
#[derive(Debug, thiserror::Error)]
pub enum PermissionError {
    /// Another process holds the image, or does not share what is needed.
    #[error("Failed to get {}\"{perm}\" lock", if *.shared { "shared " } else { "" })]
    Locked {
        /// The permission in question.
        perm: Perm,
        /// Whether it is about sharing it (`true`) or having it (`false`).
        shared: bool,
        /// Path of the image. The remedy is [`PermissionError::hint`].
        filename: String,
    },
    /// The kernel refused to lock the image at all.
    #[error("Cannot lock image '{filename}'")]
    Lock {
        /// Path of the image.
        filename: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Write or resize rights were asked of a read-only node.
    #[error("Block node is read-only")]
    ReadOnly,
}

impl PermissionError {
    /// What the user may do about it: a line for people, not part of the error
    /// text (as in QEMU, whose QMP replies do not carry it).
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Locked { filename, .. } => {
                Some(format!("Is another process using the image [{filename}]?"))
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_print_in_qemus_words() {
        assert_eq!(
            (Perm::WRITE | Perm::CONSISTENT_READ).to_string(),
            "consistent read, write"
        );
        assert_eq!((!Perm::ALL).to_string(), "");
    }

    #[test]
    fn a_lock_conflict_says_which_lock_and_asks_who_has_the_image() {
        let error = PermissionError::Locked {
            perm: Perm::WRITE,
            shared: true,
            filename: "a.img".into(),
        };
        assert_eq!(error.to_string(), "Failed to get shared \"write\" lock");
        assert_eq!(
            error.hint().as_deref(),
            Some("Is another process using the image [a.img]?")
        );
    }

    #[test]
    fn two_users_need_the_union_and_share_the_intersection() {
        let writer = Permissions {
            need: Perm::WRITE,
            share: Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
        };
        let reader = Permissions {
            need: Perm::CONSISTENT_READ,
            share: !Perm::RESIZE,
        };
        let both = writer.and(reader);
        assert_eq!(both.need, Perm::WRITE | Perm::CONSISTENT_READ);
        assert_eq!(both.share, Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED);
        assert_eq!(Permissions::IDLE.and(writer), writer);
    }
}
