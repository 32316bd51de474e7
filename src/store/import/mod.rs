//! Import: what an image's source is, and who imports that. An image becomes `images/<id>`, whole and on the disk, or nothing does.
//!
//! The steps: stage on the store's own file system, hash and place in one pass, check, write manifest and index, `syncfs`
//! with its error checked, write and sync `meta.json`, rename without replacing, sync the directory of images. A rename that
//! finds the image there already is a second import of the same bytes: the one that is there is looked at and used.
//!
//! * `source`: what it comes from, and how it is imported
//! * `appc`: an AppC archive or directory
//! * `layout`, `oci`: an OCI layout or docker archive: what is in it; its layers
//! * `single`: one layer by itself, as containerd hands it over
//! * `publish`: what was staged gets its place

mod appc;
mod layout;
mod oci;
mod publish;
#[cfg(feature = "containerd")]
mod single;
mod source;

#[cfg(feature = "containerd")]
pub(crate) use single::Blob;
pub use source::{ImageSource, ImportOptions, Imported, Outcome};

pub(super) use layout::Layout;

use super::Store;
use super::archive::input::Archive;
use super::archive::write::DirectoryImage;
use super::names::check_name;
use super::signed::Signature;
use super::staging;
use crate::error::{Error, Kind, Result, show};

impl Store {
    /// Import an image: an AppC archive or directory, an OCI layout, a docker archive. Importers of one image at the same time
    /// all succeed, and one copy is there.
    ///
    /// ```
    /// use fsprov::store::{ImageSource, ImportOptions, Outcome, Store};
    /// # let dir = tempfile::tempdir().unwrap();
    /// # let (state_root, rootfs) = (dir.path().join("state"), dir.path().join("rootfs"));
    /// std::fs::create_dir_all(rootfs.join("etc"))?;
    /// std::fs::write(rootfs.join("etc/hostname"), "box")?;
    /// let store = Store::open(&fsprov::StatePaths::new(state_root))?;
    /// let options = ImportOptions { name: Some("example.com/box".into()), ..ImportOptions::default() };
    /// let imported = store.import(&ImageSource::at(&rootfs)?, &options)?;
    /// assert_eq!(imported.outcome, Outcome::Created);
    /// assert_eq!(store.import(&ImageSource::at(&rootfs)?, &options)?.outcome, Outcome::Existing);
    /// assert_eq!(store.list()?[0].names, ["example.com/box"]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// Errors: [`Kind::Invalid`] for an archive or manifest that breaks the rules, [`Kind::Limit`] past
    /// [`ImportOptions::limits`], [`Kind::Integrity`] if it is not the image expected, [`Kind::Usage`] for a directory
    /// without manifest and name.
    pub fn import(&self, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        if let Some(name) = &options.name {
            check_name(name)?;
        }
        staging::clean(&self.paths)?;
        self.import_source(source, options).map_err(|e| e.within("import", source))
    }

    fn import_source(&self, source: &ImageSource, options: &ImportOptions) -> Result<Imported> {
        match source {
            ImageSource::Downloaded { path, .. } if path.is_dir() => {
                self.refuse_unsigned(source, false, "a pulled image has no detached signature")?;
                let why = "not an OCI layout";
                let layout = Layout::at(path, &source.to_string())?;
                let layout = layout.ok_or_else(|| Error::new(Kind::Invalid, "read", source, why))?;
                self.import_layout(&layout, source, options)
            }
            ImageSource::Archive(path) | ImageSource::Downloaded { path, .. } => {
                let archive = Archive::open(path)?;
                self.import_archive(archive, source, options)
            }
            ImageSource::Flattened(id) => Err(Error::new(Kind::Usage, "import", id, "it is in the store")
                .hint("Store::flatten makes one layer of it")),
            ImageSource::Stdin => {
                let input = Box::new(std::io::stdin());
                let archive = Archive { name: source.to_string(), input, total: None };
                self.import_archive(archive, source, options)
            }
            ImageSource::Directory(path) => {
                self.refuse_unsigned(
                    source,
                    options.signature == Signature::Waived,
                    "a directory has no bytes that were signed",
                )?;
                if let Some(layout) = Layout::at(path, &source.to_string())? {
                    return self.import_layout(&layout, source, options);
                }
                if let Signature::File(file) = &options.signature {
                    return Err(Error::new(
                        Kind::Usage,
                        "check signature of",
                        source,
                        "a directory has no bytes that were signed",
                    )
                    .hint(format!("{} is of an archive: import that", show(file))));
                }
                let tree = DirectoryImage::open(path, options.name.as_deref(), &options.limits)?;
                self.import_stream(|sink| tree.write(sink), source, options, None)
            }
        }
    }
}
