//! What files in a directory of backups are called.

use super::Kind;
use super::manifest::{self, is_word};

/// What backups are written into until they are whole: names with this end.
pub const PARTIAL: &str = ".partial";

/// The name of the data of a backup.
pub fn data(stem: &str, point: u64, kind: Kind) -> String {
    format!("{stem}.{point}.{}.raw", kind.name())
}

/// The name of its list of ranges.
pub fn ranges(stem: &str, point: u64, kind: Kind) -> String {
    format!("{stem}.{point}.{}.ranges", kind.name())
}

/// The point of the backup that a file of this name is of; `None` if it is nothing that
/// backups are called. Neither hidden files nor [`manifest::NAME`] are.
pub fn point(name: &str) -> Option<u64> {
    let mut parts = name.split('.');
    let (stem, point) = (parts.next()?, parts.next()?);
    let (kind, end) = (parts.next()?, parts.next()?);
    let is_ours = is_word(stem)
        && [Kind::Full, Kind::Incremental]
            .map(Kind::name)
            .contains(&kind)
        && ["raw", "ranges"].contains(&end)
        && parts.next().is_none();
    let point = Some(point).filter(|text| is_ours && text.bytes().all(|b| b.is_ascii_digit()));
    point?.parse().ok()
}

/// Whether a file of this name is what a backup leaves that did not end. Who keeps other
/// files in the directory, whatever they end with, keeps them.
pub fn is_partial(name: &str) -> bool {
    let whole = name.strip_suffix(PARTIAL);
    whole.is_some_and(|whole| whole == manifest::NAME || point(whole).is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_backup_is_called_is_taken_for_one() {
        assert_eq!(point(&data("disk0", 7, Kind::Full)), Some(7));
        assert_eq!(point(&ranges("a_b-2", 12, Kind::Incremental)), Some(12));
        for name in [
            "disk.raw",
            "a.full.raw",
            "a.1.full",
            "a.1.full.raw.partial",
            "a.1.other.raw",
            "a.1.full.img",
            "a.-1.full.raw",
            "a..full.raw",
            "a.99999999999999999999.full.raw",
            ".1.full.raw",
            "a/b.1.full.raw",
            manifest::NAME,
        ] {
            assert_eq!(point(name), None, "{name}");
        }
    }

    #[test]
    fn what_is_not_whole_is_told_from_files_of_others() {
        for name in ["a.1.full.raw.partial", "diptych-backup.json.partial"] {
            assert!(is_partial(name), "{name}");
        }
        for name in ["a.1.full.raw", "film.mkv.partial", ".partial", "a.partial"] {
            assert!(!is_partial(name), "{name}");
        }
    }
}
