//! What commands take of their arguments, for the tests that hold the description of
//! the interface against it. Nothing is kept in the program itself.

/// What an argument is expected to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in crate::monitor) enum Kind {
    Any,
    Str,
    Bool,
    Int,
    Object,
    List,
    StringOrObject,
    /// One of these words; none of them are known outside of tests.
    Words(Vec<String>),
    /// A list of such words.
    ListOfWords(Vec<String>),
}

impl Kind {
    pub(super) fn words<T>(words: &[(&str, T)]) -> Self {
        Self::Words(names(words))
    }

    pub(super) fn list_of_words<T>(words: &[(&str, T)]) -> Self {
        Self::ListOfWords(names(words))
    }
}

#[cfg(not(test))]
fn names<T>(_words: &[(&str, T)]) -> Vec<String> {
    Vec::new()
}

#[cfg(not(test))]
pub(super) fn note(_path: impl Fn() -> String, _kind: Kind) {}

#[cfg(not(test))]
pub(super) fn finished(_prefix: &str) {}

#[cfg(test)]
pub(in crate::monitor) use recorder::record;
#[cfg(test)]
pub(super) use recorder::{finished, names, note};

#[cfg(test)]
mod recorder {
    use std::cell::RefCell;
    use std::collections::BTreeMap;

    use super::Kind;

    /// What was taken, by this thread.
    #[derive(Debug, Default)]
    pub(in crate::monitor) struct Taken {
        /// By paths of arguments; what was said last of each.
        pub(in crate::monitor) kinds: BTreeMap<String, Kind>,
        /// The arguments as a whole were found to have no others.
        pub(in crate::monitor) all: bool,
    }

    thread_local! {
        static TAKEN: RefCell<Taken> = RefCell::default();
    }

    /// What has been taken since the last time.
    pub(in crate::monitor) fn record() -> Taken {
        TAKEN.take()
    }

    pub(in super::super) fn names<T>(words: &[(&str, T)]) -> Vec<String> {
        words.iter().map(|(word, _)| (*word).to_owned()).collect()
    }

    pub(in super::super) fn note(path: impl Fn() -> String, kind: Kind) {
        TAKEN.with_borrow_mut(|taken| taken.kinds.insert(path(), kind));
    }

    pub(in super::super) fn finished(prefix: &str) {
        if prefix.is_empty() {
            TAKEN.with_borrow_mut(|taken| taken.all = true);
        }
    }
}
